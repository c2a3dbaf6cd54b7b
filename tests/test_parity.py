"""Our modules give the numbers of the PyTorch references; see tests/parity.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import parity

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(
    path for path in GOLDEN.iterdir() if path.name != "init_schemes.json"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_numbers_of_the_reference(path):
    report = parity.check(path)
    assert report.status == "pass", "\n".join(report.lines)


def _altered(tmp_path, name, change):
    data = dict(np.load(GOLDEN / name))
    change(data)
    path = tmp_path / name
    np.savez(path, **data)
    return path


def test_a_wrong_number_fails_the_file(tmp_path, capsys):
    def change(data):
        data["pred"] = data["pred"] + np.float32(1e-4)

    path = _altered(tmp_path, "crossmae_g_p14_l25.npz", change)
    assert parity.main([str(path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_weights_that_do_not_fit_fail_the_file(tmp_path, capsys):
    path = _altered(
        tmp_path, "mae_norm_mr060.npz",
        lambda data: data.update({"sd/norm.bias": data["sd/norm.bias"][:-1]}),
    )
    assert parity.main([str(path)]) == 1
    assert "norm.bias: (23,), expected (24,)" in capsys.readouterr().out


def test_an_array_that_nobody_compares_fails_the_file(tmp_path):
    path = _altered(
        tmp_path, "mae_norm_mr060.npz", lambda data: data.update(extra=np.zeros(3))
    )
    report = parity.check(path)
    assert report.status == "FAIL"
    assert any("extra" in line for line in report.lines)


def test_a_file_of_another_kind_is_unsupported_and_not_a_pass(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"cases": []}))
    assert parity.main([str(path)]) == 2
