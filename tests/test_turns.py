"""Steps in processes of their own take turns, and the reference is one of them."""

import itertools
import re
import sys

import pytest

from benchmarks import peer, step, turns
from crossmae_jax.cost import counting
from tests import fake_reference

TINY = [
    "model.encoder.size=W16-D1-H2/4", "model.decoder.dim=16", "model.decoder.depth=1",
    "model.decoder.num_heads=2", "data.image_size=(8, 8)", "data.batch_size=8",
]
CROSS = "configs/vitb_cross.py"

# The process of a player: its second step raises, or ends the process at once.
PLAYER = """
import os, sys, time
from benchmarks import turns

count = 0

def one_step():
    global count
    count += 1
    print("chatter")
    os.write(1, b"more of it\\n")
    if sys.argv[1] == "steps":
        time.sleep(0.1)
    if count == 2 and sys.argv[1] == "raises":
        raise MemoryError("no room\\nfor this")
    if count == 2 and sys.argv[1] == "ends":
        os._exit(3)

def make():
    print("compiles", file=sys.stderr)
    return one_step, {"platform": sys.argv[2]}

def prepare():
    if sys.argv[1] == "elsewhere":
        time.sleep(1)
    print("traces", file=sys.stderr)
    if sys.argv[1] == "falls":
        raise ValueError("no such thing")
    return make

turns.serve(prepare, lambda: 100 + count)
"""


def _player(kind, platform="cpu"):
    return turns.Player(kind, [sys.executable, "-c", PLAYER, kind, platform])


def test_one_that_ends_says_why_and_the_others_go_on(capfd):
    seen = []
    with (
        _player("steps") as steps, _player("raises") as raises, _player("ends") as ends,
        _player("falls") as falls, _player("elsewhere", platform="gpu") as elsewhere,
    ):
        found = turns.measured([steps, raises, falls, ends, elsewhere], num_steps=4)
        for player in itertools.islice(found, 4):
            seen.append(player.name)
            # Who compiles later has traced; of the first there are times.
            assert [bool(p.facts) for p in (raises, ends)] == [
                name in seen for name in ("raises", "ends")
            ]
            assert len(steps.seconds) == 4
        with pytest.raises(ValueError, match="{'steps': 'cpu', 'elsewhere': 'gpu'}"):
            next(found)
    assert seen == ["steps", "raises", "falls", "ends"]
    assert steps.facts == {"platform": "cpu"} and falls.facts == {}
    assert falls.fallen == "ValueError: no such thing" and falls.seconds == []
    printed = capfd.readouterr().err
    assert printed.rindex("traces") < printed.index("chatter")
    said = re.findall(r"^(?:compiles|\w+: .* after \d+ s)$", printed, re.MULTILINE)
    assert [re.sub(r"\d+ s", "1 s", line) for line in said] == [
        "compiles", "steps: ready after 1 s", "compiles", "raises: ready after 1 s",
        "falls: ValueError: no such thing after 1 s",
        "compiles", "ends: ready after 1 s", "compiles", "elsewhere: ready after 1 s",
    ]
    assert min(steps.seconds) >= 0.1 and not steps.fallen
    assert len(steps.cpu_seconds) == 4 and max(steps.cpu_seconds) < 0.1  # it slept
    assert steps.peak_bytes == 112  # four alone, and beside each that was ready
    assert len(raises.seconds) == 1 and raises.fallen == "MemoryError: no room"
    assert len(ends.seconds) == 1 and ends.fallen == "ended with status 3"


def test_a_ratio_is_the_median_over_pairs():
    assert turns.ratio([1.0, 2.0, 30.0], [2.0, 4.0, 3.0]) == 0.5


@pytest.fixture
def forgets():
    """Takes modules of the stand-in away again."""
    yield
    for name in ("models_cross", "models_mae", "transformer_utils"):
        sys.modules.pop(name, None)


def test_the_reference_is_built_as_the_configuration_says(tmp_path, forgets):
    config = step.load_config(CROSS, overrides=[*TINY, "model.fusion.input=False"])
    number = counting.count(config).params
    directory = fake_reference.write(tmp_path / "fake", num_params=number)
    before, paths = sys.modules.get("timm"), list(sys.path)
    options = peer.build(config, directory).options
    options.pop("norm_layer")
    assert options == dict(
        img_size=8, patch_size=4, in_chans=3, embed_dim=16, depth=1, num_heads=2,
        decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, mlp_ratio=4.0,
        norm_pix_loss=True, weight_fm=True, use_input=False, use_fm=[-1],
        self_attn=False,
    )
    assert sys.modules.get("timm") is before and sys.path == paths
    assert "timm.layers.helpers" not in sys.modules or before is not None
    config.model.decoder.depth = 2
    with pytest.raises(ValueError, match=f"has {number} parameters, ours 1"):
        peer.build(config, directory)


@pytest.mark.parametrize("config, overrides, named", [
    (CROSS, ["model.fusion.kind=multi_level", "model.fusion.maps=(0,)"],
     "model.fusion.kind"),
    ("configs/vitb_mae.py", ["model.fusion.kind=inter_block"], "model.fusion.kind"),
    (CROSS, ["loss.kind=l1"], "loss.kind"),
])
def test_what_the_reference_does_not_have_is_named(config, overrides, named, capsys):
    peer.check_config(CROSS, step.load_config(CROSS, overrides=TINY))
    config = step.load_config(config, overrides=[*TINY, *overrides])
    with pytest.raises(SystemExit):
        peer.check_config("mine", config)
    assert f"what mine asks for with {named}; it has MAE" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, theirs", [
    ("bfloat16", ["reference"]), ("float32", ["reference", "reference, compiled"]),
])
def test_ours_and_the_reference_take_turns(dtype, theirs, tmp_path, capfd):
    overrides = [*TINY, f"model.dtype={dtype}"]
    number = counting.count(step.load_config(CROSS, overrides=overrides)).params
    directory = fake_reference.write(tmp_path / "r", num_params=number, dtype=dtype)
    peer.main([
        f"--reference={directory}", f"--config={CROSS}", "--batch=8", "--steps=2",
        *[f"--override={override}" for override in overrides],
        *["--compile"] * ("reference, compiled" in theirs),
    ])
    printed = capfd.readouterr()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in printed.out.splitlines() if line.startswith("| vitb_cross |")
    ]
    assert [row[1] for row in rows] == ["ours", *theirs], printed.err
    assert rows[0][7:] == ["", ""]
    assert all(float(row[7]) > 0 and float(row[8]) > 0 for row in rows[1:])
    for row in rows:
        assert float(row[2]) > 0 and float(row[4]) > 0 and float(row[6]) > 0
    assert "chatter" not in printed.out and "chatter" in printed.err
    assert f"torch {sys.modules['torch'].__version__}" in printed.out


def test_what_the_reference_cannot_do_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        peer.main([f"--reference={tmp_path}", f"--config={CROSS}"])
    assert "has no models_cross.py, models_mae.py, transfor" in capsys.readouterr().err
    directory = fake_reference.write(tmp_path / "fake", num_params=1)
    with pytest.raises(SystemExit):
        peer.main([f"--reference={directory}", "--config=configs/vitb_mae_prmim.py"])
    assert "asks for with model.aggregator.kind, masking.throw_ratio; it has MAE" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        peer.main([f"--reference={directory}", "--config=configs/vitb_mff.py"])
    assert "asks for with model.fusion.kind, optim.decay_tokens; it has MAE" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        peer.main([f"--reference={directory}", "--config=configs/finetune_digits.py"])
    assert "does not pre-train; the reference does nothing" in capsys.readouterr().err
