"""The command that fine-tunes several numbers of blocks and draws the accuracies."""

import json

import pytest
from PIL import Image

from configs import digits_cross
from crossmae_jax import sweep, train
from crossmae_jax.commands import sweep as command
from tests.test_classify import make_config

SETTINGS = [
    "--config=configs/finetune_digits.py", "--config.epochs=2.0",
    "--config.model.size=W16-D2-H2/4", "--config.optim.warmup_epochs=0.2",
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
        assert f"| {count} | {100 * value:.2f} |" in said
    # A head on frozen random features learns less than the whole encoder.
    assert content["accuracy"]["0"] < content["accuracy"]["2"]
    picture = tmp_path / "one" / "accuracy_by_blocks.png"
    with Image.open(picture) as image:
        assert image.size == (900, 500)
    before = picture.read_bytes()

    # Again, with one more: what is finished is not trained again.
    (tmp_path / "one").rename(tmp_path / "two")
    run[-1] = f"--workdir={tmp_path / 'two'}"
    against = f"--against={tmp_path / 'two'}"
    assert command.main([*run, "--blocks=0,0.5", against]) == 0
    said = capsys.readouterr().out
    assert said.count("FRESH START") == 1 and said.count("RESUMED at step 30") == 1
    again = json.loads((tmp_path / "two" / "sweep.json").read_text())["accuracy"]
    assert list(again) == ["0", "0.5"] and again["0"] == content["accuracy"]["0"]
    assert (tmp_path / "two" / "accuracy_by_blocks.png").read_bytes() != before


def test_what_is_no_sweep_is_refused_before_it_trains(digits_dir, tmp_path):
    with pytest.raises(train.SetupError, match="objective='pretrain'"):
        sweep.run(digits_cross.get_config(), tmp_path, blocks=[0.0])
    with pytest.raises(train.SetupError, match=r"blocks=\[1.0, 1.0\]"):
        sweep.run(make_config(digits_dir), tmp_path, blocks=[1.0, 1.0])
    with pytest.raises(SystemExit, match="sweep.json does not exist"):
        command.main([
            *SETTINGS, "--blocks=0", f"--workdir={tmp_path}",
            f"--against={tmp_path / 'none'}",
        ])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--blocks=0"], "--workdir is missing"),
    (["--workdir=x"], "--blocks is missing"),
    (["--workdir=x", "--blocks=all"], "--blocks=all must be numbers"),
])
def test_flags_that_are_missing_or_wrong_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*SETTINGS, *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
