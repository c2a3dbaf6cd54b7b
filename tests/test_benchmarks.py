"""The step benchmark measures the real training step and says what it ran on."""

import re

import jax
import pytest

from benchmarks import step
from crossmae_jax import cost

TINY = [
    "model.size=W16-D1-H2/4", "model.decoder_dim=16", "model.decoder_depth=1",
    "model.decoder_heads=2", "model.dtype=bfloat16",
]


@pytest.mark.parametrize("kind, peak", [
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("cpu", None),
])
def test_the_peak_is_found_by_the_name_that_jax_gives_a_device(kind, peak):
    assert step.peak_tflops(kind) == peak


def test_overrides_are_numbers_tuples_or_plain_words_and_the_last_one_counts():
    config = step.load_config("configs/digits_cross.py", overrides=[
        "model.dtype=bfloat16", "optim.clip_norm=3", "data.image_size=(8, 16)",
        "seed=1", "seed=2",
    ])
    assert config.model.dtype == "bfloat16" and config.optim.clip_norm == 3.0
    assert config.data.image_size == (8, 16) and config.seed == 2


WRONG_OVERRIDES = {
    "model.dtyp=float32":
        "Unknown setting model.dtyp. Did you mean dtype?",
    "modle.dtype=float32":
        "Unknown setting modle.dtype. Did you mean model?",
    "evals.umap.k=1":
        "Unknown setting evals.umap.k. There are: knn, linear, reconstruction.",
    "seed.x=1": "Unknown setting seed.x.",
    "masking=0.5": "masking is a group of settings. There are: mask_ratio, pred_ratio, "
        "retain, throw_ratio.",
    "optim.base_lr=fast": "optim.base_lr='fast' is of type str; give one of type "
        "float, such as 0.012.",
    "optim.clip_norm=big":
        "optim.clip_norm='big' is of type str; give one of type float.",
    "model.dtype": "'model.dtype' has no value; write model.dtype=VALUE.",
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_a_wrong_override_ends_in_one_line_with_what_to_do(override, capsys):
    with pytest.raises(SystemExit) as caught:
        step.main([
            "--config=configs/digits_cross.py", "--batch=8", f"--override={override}"
        ])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{WRONG_OVERRIDES[override]}\n"


def test_a_config_file_that_does_not_exist_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        step.main(["--config=configs/digits_crss.py", "--batch=8"])
    assert caught.value.code == 2
    assert "Did you mean configs/digits_cross.py?" in capsys.readouterr().err


def test_the_share_of_peak_is_of_all_devices_and_of_bf16_only():
    config = step.load_config(
        "configs/digits_cross.py", overrides=["data.batch_size=8", *TINY]
    )
    run = step.Run("x", config, 1.0, 1, lambda: None, seconds=[0.5, 1.0, 9.0])
    operations = cost.count(config).train_flops * 8
    peak = operations / 1e12 / jax.device_count() * 4  # TFLOP/s: a quarter is used
    assert step.share_of_peak(run, peak) == "25.0%"
    assert step.share_of_peak(run, None) == "unknown"
    config.model.dtype = "float32"
    assert step.share_of_peak(run, peak) == "unknown"


def test_configurations_take_turns_and_are_compared_pair_by_pair(monkeypatch, capsys):
    order = []
    measured = step.measure

    def measure(runs, *, num_steps):
        for run in runs:
            def one_step(inner=run.step, name=run.name):
                order.append(name)
                inner()
            run.step = one_step
        measured(runs, num_steps=num_steps)
        for run in runs:  # known times: the ratio of the pairs is 0.5, 0.5, 0.1
            times = {"digits_mae": [2.0, 4.0, 30.0], "digits_cross": [1.0, 2.0, 3.0]}
            run.seconds = times[run.name]

    monkeypatch.setattr(step, "measure", measure)
    arguments = ["--config=configs/digits_cross.py", "--against=configs/digits_mae.py"]
    for override in TINY:
        arguments.append(f"--override={override}")
    step.main([*arguments, "--batch=8", "--steps=3"])
    assert order == ["digits_mae", "digits_cross"] * 3
    printed = capsys.readouterr().out
    assert f"8 x cpu ({step._processor()}); python" in printed
    assert "changed settings: model.size=W16-D1-H2/4" in printed
    cells = [cell.strip() for cell in printed.splitlines()[-2].split("|")[1:-1]]
    assert cells[:3] == ["digits_cross", "4.0", "2000.0 (1000.0..3000.0)"]
    assert cells[4] == "unknown" and float(cells[5]) > 0
    assert cells[7] == "0.500"


def test_the_table_is_appended_to_the_results(monkeypatch, tmp_path, capsys):
    config = step.load_config(
        "configs/digits_cross.py", overrides=["data.batch_size=8"]
    )
    monkeypatch.setattr(step, "RESULTS", tmp_path / "results" / "step.md")
    monkeypatch.setattr(
        step, "prepare",
        lambda name, config: step.Run(name, config, 1.0, 2**30, lambda: None),
    )
    for _ in range(2):
        step.main(["--config=configs/digits_cross.py", "--batch=8", "--write"])
    printed = capsys.readouterr().out
    assert (tmp_path / "results" / "step.md").read_text() == printed
    flops = cost.count(config).train_flops / 1e9
    assert len(re.findall(rf"\| digits_cross \| .* \| {flops:.2f} \| ", printed)) == 2
