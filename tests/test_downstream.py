"""The table of what pre-training is worth: real short runs, read back, tabulated."""

import json

import pytest
from PIL import Image

from benchmarks import downstream
from crossmae_jax import train

TINY = [
    "model.encoder.size=W16-D1-H2/4", "epochs=0.3", "optim.warmup_epochs=0.1",
    "data.batch_size=64", "masking.pred_ratio=0.25", "model.decoder.dim=16",
    "model.decoder.depth=1",
]


def test_each_seed_has_labels_of_its_own():
    assert [downstream.split(10, seed) for seed in (0, 2)] == [
        "train[0%:10%]", "train[20%:30%]"
    ]
    assert downstream.split(100, 2) == "train"


def test_every_method_is_pre_trained_fine_tuned_and_evaluated(
    digits_dir, tmp_path, monkeypatch, capsys
):
    methods = {name: downstream.METHODS[name] for name in ("CrossMAE 0.25", "random")}
    monkeypatch.setattr(downstream, "METHODS", methods)
    monkeypatch.setattr(downstream, "SHARES", {10: 32})
    monkeypatch.setattr(downstream, "BLOCKS", (0.0,))
    monkeypatch.setattr(downstream, "STEPS", 3)
    monkeypatch.setattr(downstream, "DEPTH", 1.0)
    common = [f"data.data_dir={digits_dir}", "model.encoder.size=W16-D1-H2/4"]
    pretrain = downstream.ablation.run

    def run(path, overrides, **kwargs):
        """Pre-training is shortened, too; it has settings that fine-tuning lacks."""
        if path != downstream.FINETUNE:
            overrides = [*TINY, *overrides]
        return pretrain(path, overrides, **kwargs)

    monkeypatch.setattr(downstream.ablation, "run", run)
    arguments = [f"--workdir={tmp_path}", "--seeds", "0"]
    arguments += [f"--override={change}" for change in common]
    downstream.main(arguments)
    said = capsys.readouterr().out
    rows = {
        cells[1].strip(): [float(cell) for cell in cells[2:-1]]
        for line in said.splitlines() if line.startswith("| ")
        if (cells := line.split("|"))[1].strip() not in ("", "---")
        and "features" not in cells[1] and "trained" not in cells[1]
        and "pixels" not in cells[1] and "initialisation" not in cells[1]
        and " for " not in cells[1] and "another" not in cells[1]  # confusions
    }
    for place, method in enumerate(("CrossMAE_0.25", "random")):
        runs = tmp_path / method / "seed_0"
        tuned, frozen = runs / "finetuned_10", runs / "frozen_10"
        found = json.loads((tuned / "found.json").read_text())
        assert rows["fine-tuning, 10 % of labels"][place] == round(
            100 * found["eval/accuracy/top1"], 1
        )
        config = json.loads((tuned / "config.json").read_text())
        assert config["init_from"].endswith("pretrained") == (place == 0)
        assert config["data"]["split"] == "train[0%:10%]"
        of_frozen = json.loads((frozen / "evaluation.json").read_text())
        assert rows["linear, 10 % of labels"][place] == round(
            100 * of_frozen["metrics"]["linear/top1"], 1
        )
        config = json.loads((runs / "blocks_0_10/config.json").read_text())
        assert config["tune_blocks"] == 0
    assert set(rows) == {f"{what}, 10 % of labels" for what in (
        "fine-tuning", "linear", "k-NN, mean", "k-NN, class token",
        "0 tuned blocks", "1 tuned block",
    )}
    with Image.open(tmp_path / "accuracy_by_blocks_10.png") as picture:
        assert picture.size == (900, 500)

    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("trained again"))
    downstream.main(arguments)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("accuracy_by_blocks_10.png")
