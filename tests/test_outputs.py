"""Outputs that nobody here has thought of reach an evaluator of a run by name."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import errors, evals, train
from crossmae_jax.evals import features
from crossmae_jax.evals.evaluator import Result, Wanted
from crossmae_jax.objectives.objective import Output, Outputs
from crossmae_jax.objectives.pretrain import Pretrain
from tests import quick_digits


@dataclasses.dataclass(frozen=True)
class Maps:
    """Writes maps of images, and looks at vectors of all of them."""

    num_images: int

    def wanted(self):
        return Wanted("eval", self.num_images, "maps"), Wanted("eval", None, "vectors")

    def check(self, about):
        assert {"maps", "vectors", "features"} <= about.outputs

    def run(self, evaluation):
        give, found = evaluation.output("maps"), []
        for batch in evaluation.batches("eval", self.num_images):
            batch = evaluation.place(batch)
            valid, maps = features.to_host((batch["valid"], give(batch)))
            again = features.to_host(give(batch))
            found.append(maps["mask"][valid])
            np.testing.assert_array_equal(maps["mask"], again["mask"])
        path = evaluation.path("maps", ".npy")
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.concatenate(found))
        vectors = evaluation.features_of("eval", output="vectors").values
        whole = evaluation.features_of("eval").values
        np.testing.assert_allclose(vectors, 2 * whole, rtol=1e-6)
        return Result({"images": float(len(vectors))}, (path,))


def _with_maps(monkeypatch):
    """Gives the objective two outputs more; returns what is traced of them."""
    usual, traced = Pretrain.outputs.fget, []

    def maps(objective):
        def compute(variables, batch, key):
            traced.append("maps")
            ids = objective.sample(key, batch)
            rows = jnp.arange(len(ids.keep))[:, None]
            mask = jnp.ones((len(ids.keep), objective.num_patches), bool)
            return {"mask": mask.at[rows, ids.keep].set(False)}

        return Output(compute, draws=True, caption="hidden patches")

    def vectors(objective):
        def compute(variables, batch):
            traced.append("vectors")
            return 2 * usual(objective)["features"](variables, batch)

        return Output(compute, rows=True)

    def outputs(objective):
        more = {"maps": maps(objective), "vectors": vectors(objective)}
        return Outputs(usual(objective) | more)

    monkeypatch.setattr(Pretrain, "outputs", property(outputs))
    monkeypatch.setitem(evals.EVALUATORS, "maps", Maps)
    return traced


def _config(digits_dir):
    config = quick_digits.get_config()
    config.evals = {"maps": dict(every_epochs=0.2, num_images=5)}
    config.update_from_flattened_dict({
        "data.data_dir": digits_dir, "epochs": 0.4, "optim.warmup_epochs": 0.1,
    })
    return config


def test_a_run_evaluates_an_output_of_its_own(digits_dir, tmp_path, monkeypatch):
    """Maps of a few images and vectors of all, traced once each, files in the run."""
    traced = _with_maps(monkeypatch)
    config = _config(digits_dir)
    found = train.run(config, tmp_path / "run")
    assert found["eval/maps/images"] > 100
    written = sorted((tmp_path / "run" / "maps").glob("step_*.npy"))
    assert len(written) > 1 and sorted(traced) == ["maps", "vectors"]
    first, *others = (np.load(path) for path in written)
    hidden = 16 - int(16 * (1 - config.masking.mask_ratio))
    assert first.shape == (5, 16) and (first.sum(1) == hidden).all()
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_an_output_that_the_objective_lacks_is_refused_before_the_training(
    digits_dir, tmp_path, monkeypatch
):
    monkeypatch.setitem(evals.EVALUATORS, "maps", Maps)
    with pytest.raises(errors.SetupError, match="evals.maps needs the output maps, ve"):
        train.run(_config(digits_dir), tmp_path / "run")
