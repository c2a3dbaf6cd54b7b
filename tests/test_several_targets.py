"""A model that predicts several targets, some of them at places that are asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict

from crossmae_jax import convert, targets
from crossmae_jax.convert import names, starting
from crossmae_jax.cost import counting
from crossmae_jax.evals import of_checkpoint
from crossmae_jax.models import (
    decoder_cross,
    decoders,
    init_schemes,
    layers,
    mim,
    posemb,
)
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.tokens import Tokens, patchify
from tests import drawn, saved_runs
from tests.saved_runs import tiny_config
from tests.test_aggregator import BATCH, CROSS, GRID, make_aggregator
from tests.test_models import MAE, make_config


class TwoHeads(decoder_cross.CrossDecoder):
    """Predicts two targets of the same tokens, "near" and "far"."""

    def __post_init__(self):
        nn.Module.__post_init__(self)

    def setup(self):
        self.mask_token = self.param("mask_token", init_schemes.token, (1, 1, self.dim))
        self.decoder_pos_embed = self.variable(
            "constants", "decoder_pos_embed",
            lambda: jnp.asarray(posemb.sincos(self.grid, self.dim)),
        )
        self.heads = {name: layers.Dense(n) for name, n in self.widths.items()}

    def __call__(self, contexts, ids, asked):
        places = {name: asked.get(name, ids.pred) for name in self.widths}
        return {
            name: Tokens(self.queries(ids) + 0 * contexts[0].cls, ids, self.grid)
            for name, ids in places.items()
        }

    def head(self, name, tokens, ids, asked):
        return tokens.with_values(self.heads[name](tokens.values))


def test_every_target_has_an_aggregator_of_its_own_unless_it_is_asked_for():
    config = make_config(**CROSS, model__fusion__kind="last")
    plain = mim.build(config)
    model = mim.MaskedImageModel(
        encoder=plain.encoder, fusion=plain.fusion,
        decoder=TwoHeads(
            widths={"near": 5, "far": 7}, dim=16, depth=1, num_heads=2, grid=GRID
        ),
        aggregators={
            name: make_aggregator(visible="zeros").clone(
                name=f"aggregator_{name}", dim=16
            )
            for name in ("near", "far")
        },
    )
    objective = Pretrain(config)
    ids = objective.sample(jax.random.key(1), BATCH)
    images = jnp.zeros((2, 16, 24, 3))
    asked = {"far": jnp.array([[3, 1], [2, 5]])}
    variables = drawn.variables(model.init, images, ids)
    for name in ("near", "far"):
        assert f"aggregator_{name}" in variables["params"]
    both = jax.jit(model.apply)(variables, images, ids)
    assert {name: x.values.shape for name, x in both.items()} == {
        "near": (2, 18, 5), "far": (2, 18, 7)
    }
    some = jax.jit(model.apply)(variables, images, ids, asked)
    np.testing.assert_array_equal(some["far"].ids, asked["far"])
    np.testing.assert_array_equal(some["near"].values, both["near"].values)


@dataclasses.dataclass(frozen=True)
class Two:
    """Two targets of the same patches: their means, and all of their pixels."""

    image_size: tuple[int, int]
    channels: int
    patch_size: int

    caption = None
    groups = starts = FrozenDict()

    @property
    def widths(self):
        return {"near": 1, "far": self.channels * self.patch_size**2}

    @property
    def grids(self):
        grid = tuple(side // self.patch_size for side in self.image_size)
        return dict.fromkeys(self.widths, grid)

    def init(self, key):
        return {}

    def __call__(self, variables, images):
        values = patchify(images, patch_size=self.patch_size)
        grid = tuple(side // self.patch_size for side in self.image_size)
        means = Tokens(values.mean(-1, keepdims=True), None, grid)
        return {"near": means, "far": Tokens(values, None, grid)}

    def pixels(self, predicted, images):
        raise AssertionError("without a caption nobody asks for pixels")


def test_the_aggregators_of_several_targets_are_one_part(tmp_path, monkeypatch):
    """Whether training starts from them, or an evaluation has no use for them."""
    monkeypatch.setitem(targets.TARGETS, "two", Two)
    monkeypatch.setitem(decoders.DECODERS, "cross", TwoHeads)
    config = tiny_config("digits_cross_prmim")
    with config.unlocked():
        config.target = dict(kind="two")
    monkeypatch.setattr(saved_runs, "tiny_config", lambda *_: config)
    run = saved_runs.save_run(tmp_path / "run", "digits_cross_prmim")
    like = jax.eval_shape(Pretrain(config).init, jax.random.key(0))
    assert {"aggregator_near", "aggregator_far"} <= like["params"].keys()
    start = starting.plan(str(run), like, config)
    assert start.tensors.keys() == names.without_collections(like).keys()
    number = len(jax.tree.leaves([
        tree for part, tree in like["params"].items() if part.startswith("aggregator")
    ]))
    part = f"aggregator ({number} tensors)"
    assert any("loaded " in line and part in line for line in start.report)
    encoder = tmp_path / "encoder.safetensors"
    convert.export_weights(run, encoder, format="safetensors", parts="encoder")
    opened = of_checkpoint.open_checkpoint(encoder, config)
    assert any("new " in note and part in note for note in opened.notes)
    assert "aggregator_near" not in counting.count(config).parts


def test_a_decoder_of_masked_patches_refuses_what_may_be_visible():
    objective = Pretrain(make_config(**MAE))
    ids = objective.sample(jax.random.key(1), BATCH)
    images, asked = jnp.zeros((2, 16, 24, 3)), {"rows": jnp.array([[3, 1], [2, 5]])}
    with pytest.raises(ValueError, match="asks for rows at places that may be visible"):
        objective.model.init(jax.random.key(0), images, ids, asked)
