"""Our modules give the numbers of the PyTorch references; see tests/parity.py."""

import json
from collections import Counter
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


def _lars(arrays, *, rates, decay, momentum, trust):
    """Returns parameters after each update and the last momentum, in float64."""
    updated, last = {}, {}
    for name in (key.removeprefix("init/") for key in arrays if key[:5] == "init/"):
        w = arrays[f"init/{name}"].astype(np.float64)
        buffer, steps = np.zeros_like(w), []
        for rate, gradient in zip(rates, arrays[f"grad/{name}"], strict=True):
            u = gradient.astype(np.float64)
            if w.ndim > 1:
                u = u + decay * w
                norms = np.linalg.norm(w), np.linalg.norm(u)
                u = u * (trust * norms[0] / norms[1] if all(norms) else 1.0)
            buffer = momentum * buffer + u
            w = w - rate * buffer
            steps.append(w)
        updated[f"params/{name}"], last[f"momentum/{name}"] = np.stack(steps), buffer
    return updated | last


@pytest.mark.parametrize("trust", [0.0005, 0.02])
def test_the_trust_coefficient_of_lars_is_the_files(tmp_path, trust):
    def change(data):
        config = json.loads(str(data["config"])) | {"trust_coefficient": trust}
        data["config"] = np.array(json.dumps(config))
        data |= {
            name: value.astype(np.float32) for name, value in _lars(
                data, rates=config["lr_per_step"], decay=config["weight_decay"],
                momentum=config["momentum"], trust=trust,
            ).items()
        }

    path = _altered(tmp_path, "lars_traj_wd.npz", change)
    report = parity.check(path)
    assert report.status == "pass", "\n".join(report.lines)

    def change_that_only(data):
        config = json.loads(str(data["config"])) | {"trust_coefficient": trust}
        data["config"] = np.array(json.dumps(config))

    path = _altered(tmp_path, "lars_traj_wd.npz", change_that_only)
    assert parity.check(path).status == "FAIL"


def _decayed(model, *, depth, pooled, decay):
    """Returns a table of rates by layer, by the rule of MAE's `util/lr_decay.py`."""
    layers = {"cls_token": 0, "pos_embed": 0}
    modules = {"patch_embed.proj": 0, "fc_norm" if pooled else "norm": depth + 1}
    modules["head"] = depth + 1
    for i in range(depth):
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            modules[f"blocks.{i}.{name}"] = i + 1
    for name, layer in modules.items():
        layers[f"{name}.weight"] = layers[f"{name}.bias"] = layer
    params = {
        name: dict(
            lr_scale=decay ** (depth + 1 - layer),
            weight_decay=0.0 if name.endswith(("bias", "token", "pos_embed")) or (
                "norm" in name
            ) else 0.05,
        ) for name, layer in layers.items()
    }
    groups = Counter(tuple(values.values()) for values in params.values())
    return dict(
        model=model, depth=depth, global_pool=pooled, layer_decay=decay,
        weight_decay=0.05, params=params, groups_in_order=[
            dict(lr_scale=scale, weight_decay=weight_decay, n_params=count)
            for (scale, weight_decay), count in groups.items()
        ],
    )


@pytest.mark.parametrize("model, depth, pooled, decay", [
    ("vit_tiny_patch16", 12, True, 0.65), ("vit_small_patch16", 12, False, 0.75),
    ("vit_base_patch16", 12, True, 1.0),
    ("vit_large_patch16", 24, True, 0.75), ("vit_large_patch16", 24, False, 0.65),
    ("vit_huge_patch14", 32, True, 0.65), ("vit_huge_patch14", 32, False, 0.75),
])
def test_rates_by_layer_are_compared_for_every_size(
    tmp_path, model, depth, pooled, decay
):
    table = _decayed(model, depth=depth, pooled=pooled, decay=decay)
    path = tmp_path / "table.json"
    path.write_text(json.dumps([table]))
    report = parity.check(path)
    assert report.status == "pass", "\n".join(report.lines)
    if decay < 1:
        table["params"]["blocks.3.mlp.fc1.weight"]["lr_scale"] *= decay
        path.write_text(json.dumps([table]))
        assert parity.check(path).status == "FAIL"


def test_rates_of_a_model_that_is_not_published_fail_with_the_known_ones(tmp_path):
    table = _decayed("vit_giant_patch14", depth=40, pooled=True, decay=0.75)
    path = tmp_path / "table.json"
    path.write_text(json.dumps([table]))
    report = parity.check(path)
    assert report.status == "FAIL" and "tiny, small, base, large, huge" in (
        report.lines[-1]
    )
