"""The command that fine-tunes several numbers of blocks and draws the accuracies."""

import json
import re

import pytest
from PIL import Image

from configs import digits_cross
from crossmae_jax import errors, sweep
from crossmae_jax.commands import sweep as command
from tests.test_classify import make_config

SETTINGS = [
    "--config=configs/finetune_digits.py", "--config.epochs=2.0",
    "--config.model.encoder.size=W16-D2-H2/4", "--config.optim.warmup_epochs=0.2",
    "--config.data.batch_size=96", "--config.optim.base_lr=0.03",
]


def test_a_sweep_trains_each_number_of_blocks_and_draws_the_curve(
    digits_dir, tmp_path, capsys
):
    run = [
        *SETTINGS, f"--config.data.data_dir={digits_dir}",
        f"--workdir={tmp_path / 'one'}",
    ]
    assert command.main([*run, "--blocks=2,0"]) == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "one" / "sweep.json").read_text())
    assert list(content["accuracy"]) == ["0", "2"]
    for count, value in content["accuracy"].items():
        best = tmp_path / "one" / f"blocks_{count}" / "best" / "best.json"
        assert json.loads(best.read_text())["value"] == value
        assert re.search(rf"\| {count} +\| +{100 * value:.2f} \|", said)
    # A head on frozen random features learns less than the whole encoder.
    assert content["accuracy"]["0"] < content["accuracy"]["2"]
    picture = tmp_path / "one" / "accuracy_by_blocks.png"
    with Image.open(picture) as image:
        assert image.size == (900, 500)
    before = picture.read_bytes()

    # With one more: the curve grows, and what is finished is not trained again.
    assert command.main([*run, "--blocks=0,0.5"]) == 0
    said = capsys.readouterr().out
    assert said.count("FRESH START") == 1 and said.count("RESUMED at step 30") == 1
    again = json.loads((tmp_path / "one" / "sweep.json").read_text())["accuracy"]
    assert list(again) == ["0", "0.5", "2"] and again | content["accuracy"] == again
    assert picture.read_bytes() != before

    with pytest.raises(SystemExit, match="holds a sweep from init_from=''"):
        command.main([*run, "--blocks=1", "--config.init_from=elsewhere"])


def test_sweeps_are_drawn_under_names_that_tell_them_apart(tmp_path, monkeypatch):
    for name, value in (("mae", 0.5), ("crossmae", 0.75)):
        directory = tmp_path / name / "sweep"
        directory.mkdir(parents=True)
        content = {"init_from": "", "accuracy": {"0": value, "0.5": value + 0.1}}
        (directory / "sweep.json").write_text(json.dumps(content))
    directories = [tmp_path / "mae" / "sweep", tmp_path / "crossmae" / "sweep"]
    drawn = {}
    monkeypatch.setattr(
        sweep.visualize, "accuracy_by_blocks",
        lambda curves, path: drawn.update(curves) or path,
    )
    sweep.draw(directories, tmp_path / "picture.png")
    assert drawn == {
        "mae/sweep": {0.0: 0.5, 0.5: 0.6}, "crossmae/sweep": {0.0: 0.75, 0.5: 0.85}
    }
    with pytest.raises(errors.SetupError, match="compared with itself"):
        sweep.names([directories[0], directories[0] / ".." / "sweep"])


def test_what_is_no_sweep_is_refused_before_it_trains(digits_dir, tmp_path):
    with pytest.raises(errors.SetupError, match="objective='pretrain'"):
        sweep.run(digits_cross.get_config(), tmp_path, blocks=[0.0])
    with pytest.raises(errors.SetupError, match=r"blocks=\[1.0, 1.0\]"):
        sweep.run(make_config(digits_dir), tmp_path, blocks=[1.0, 1.0])
    for blocks in ([0.0, 1.5], [0.0, 3.0]):
        with pytest.raises(errors.SetupError, match="at most the encoder's 2"):
            sweep.run(make_config(digits_dir), tmp_path, blocks=blocks)
    top5 = make_config(digits_dir, checkpoint__best="eval/accuracy/top5")
    with pytest.raises(errors.SetupError, match="checkpoint.best='eval/accuracy/top5'"):
        sweep.run(top5, tmp_path, blocks=[0.0])
    with pytest.raises(SystemExit, match="sweep.json does not exist"):
        command.main([
            *SETTINGS, "--blocks=0", f"--workdir={tmp_path}",
            f"--against={tmp_path / 'none'}",
        ])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--blocks=0"], "--workdir is missing"),
    (["--workdir=x"], "--blocks is missing"),
    (["--workdir=x", "--blocks=all"], "--blocks=all: expected numbers"),
])
def test_flags_that_are_missing_or_wrong_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*SETTINGS, *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
