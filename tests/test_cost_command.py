"""`python -m crossmae_jax cost` prints the published shares, and says what is wrong."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import vitb_mae
from crossmae_jax import __main__ as front_door
from crossmae_jax.cost import counting

ROOT = Path(__file__).parents[1]
MAE = "configs/vitb_mae.py"
PROGRESSIVE = [
    f"--config={MAE}", "--config.masking.throw_ratio=0.5",
    "--config.model.aggregator.kind=conv",
]


@functools.cache
def count(text, counted=counting.count):
    """Counts a configuration once, however many tests print it."""
    return counted(ConfigDict(json.loads(text)))


@pytest.fixture
def run(capsys, monkeypatch):
    """Returns a function that runs the command: status, output, errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(counting, "count", lambda config: count(config.to_json()))

    def run(*arguments):
        try:
            status = front_door.main(["cost", *arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def rows(printed):
    """Returns the cells of all tables, by the first cell of the row."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells}


SHARES = {
    "72.4%": [*PROGRESSIVE, f"--against={MAE}"],
    "66.2%": ["--config=configs/vitb_cross.py", f"--against={MAE}"],
    "98.7%": ["--config", "configs/vitb_cross75.py", "--against", MAE],
    "84.9%": ["--config=configs/vitl_cross.py", "--against=configs/vitl_mae.py"],
}


@pytest.mark.parametrize("share", SHARES)
def test_published_shares_are_reproduced(run, share):
    status, printed, errors = run(*SHARES[share])
    assert (status, errors) == (0, "")
    assert rows(printed)["total"][2] == share


def test_the_documentation_shows_what_is_printed(run):
    _, printed, _ = run(*PROGRESSIVE, f"--against={MAE}")
    page = (ROOT / "docs" / "configs.md").read_text()
    assert printed.strip() in page
    for argument in PROGRESSIVE:
        assert argument in page


def test_every_row_is_the_counted_one(run):
    config = vitb_mae.get_config()
    config.masking.throw_ratio, config.model.aggregator.kind = 0.5, "conv"
    counted = counting.count(config)
    _, printed, _ = run(*PROGRESSIVE)
    assert list(counted.parts) == ["encoder", "decoder", "aggregator"]
    expected = {
        **counted.parts,
        "position tables, not trained": (0, counted.others["constants"]),
        "total": (counted.macs, counted.params),
    }
    found = rows(printed)
    for name, (macs, params) in expected.items():
        assert found.pop(name) == [f"{macs / 1e9:.4f}", f"{params / 1e6:.3f}"]
    assert found.pop("config") == ["196", "49", "49", "98", "99"]
    assert {name.strip("-") for name in found} == {"part", "tokens", ""}
    assert f"{counted.train_flops / 1e9:.3f} GFLOPs an image" in printed


def test_a_classifier_is_counted_too_beside_any_other(run):
    status, printed, errors = run(
        "--config=configs/linprobe_vitb.py", f"--against={MAE}"
    )
    assert (status, errors) == (0, "")
    found = rows(printed)
    assert list(found)[2:6] == [
        "encoder", "head", "running statistics, not trained", "total"
    ]
    assert found["total"][:2] == ["17.5638", "86.569"]
    assert found["head"] == ["0.0008", "0.769", "-", "-"]
    assert found["config"] == ["196", "196", "0", "0", "0"]
    assert "1 pass, and 2 more of 0.0008 GMACs, x 2 operations:\n35.131" in printed


def test_settings_do_not_touch_the_other_file(run):
    _, printed, _ = run(*PROGRESSIVE, f"--against={MAE}")
    found = rows(printed)
    assert found["against"] == ["196", "49", "147", "0", "197"]
    assert found["aggregator"][2:] == ["-", "-"]  # a share of nothing
    _, printed, _ = run(f"--config={MAE}", f"--against={MAE}")
    assert rows(printed)["total"][2:] == ["100.0%", "100.0%"]


def test_no_device_is_used():
    found = subprocess.run(
        [sys.executable, "-m", "crossmae_jax", "cost", *PROGRESSIVE],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "nowhere"},  # devices cannot be started
    )
    assert found.returncode == 0, found.stderr
    assert rows(found.stdout)["total"][0] == "7.0818"


def test_help_says_how_to_call_it(run):
    status, printed, _ = run("--help")
    assert status == 0
    assert "--config=FILE" in printed and "--against=FILE" in printed


CONFIG = f"--config={MAE}"
WRONG = {
    "--config is missing": (2, []),
    "No config file configs/vitb_mea.py. Did you mean configs/vitb_mae.py?":
        (2, ["--config=configs/vitb_mea.py"]),
    "No config file configs/vitb_cros.py. Did you mean configs/vitb_cross.py?":
        (2, [CONFIG, "--against=configs/vitb_cros.py"]),
    "configs/common.py has no function get_config": (2, ["--config=configs/common.py"]),
    "Not Python: README.md, line": (2, [CONFIG, "--against=README.md"]),
    "Unknown setting --config.masking.throw_rato. Did you mean throw_ratio?":
        (2, [CONFIG, "--config.masking.throw_rato=0.5"]),
    "Unknown setting --config.data.flop. Did you mean flip?":
        (2, [CONFIG, "--noconfig.data.flop"]),
    "could not convert string to float: 'half'\nWrite":
        (2, [CONFIG, "--config.masking.throw_ratio=half"]),
    "invalid literal for int() with base 10: '8.5'\nWrite":
        (2, [CONFIG, "--config.model.decoder.depth=8.5"]),
    "Unknown flag --againts. Did you mean --against?\nWrite":
        (2, [CONFIG, f"--againts={MAE}"]),
    "--config.model.aggregator is a group of settings. There are: kernel_size, kind,":
        (2, [CONFIG, "--config.model.aggregator=conv"]),
    "Unexpected arguments: masking.throw_ratio=0.5.":
        (2, [CONFIG, "masking.throw_ratio=0.5"]),
    f"error: {MAE}: throw_ratio=0.8 throws 157 of 196 patches but mask_ratio=0.75 "
    "removes only 147.": (1, [CONFIG, "--config.masking.throw_ratio=0.8"]),
    f"error: {MAE}: pred_ratio=0.9 predicts 176 of 196 patches":
        (1, [CONFIG, "--config.masking.pred_ratio=0.9"]),
    f"error: {MAE}: aggregator.kind='conv' predicts thrown patches, but "
    "throw_ratio=0.0 throws 0 of 196 patches":
        (1, [CONFIG, "--config.model.aggregator.kind=conv"]),
    "error: configs/finetune_folder.py: data.num_classes=None, and no data is":
        (1, ["--config=configs/finetune_folder.py"]),
    f"error: {MAE}: Unknown aggregator.kind 'cnov'. Known: conv, convnext, none, pool":
        (1, [*PROGRESSIVE, "--config.model.aggregator.kind=cnov"]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_in_two_lines_at_most(run, message):
    expected, arguments = WRONG[message]
    status, printed, errors = run(*arguments)
    assert (status, printed) == (expected, "")
    assert message in errors
    assert len(errors.splitlines()) <= 2 and "Traceback" not in errors
