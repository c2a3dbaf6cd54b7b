"""Renaming and re-laying tensors: tables in both directions, misfits named."""

import jax
import numpy as np
import pytest

from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.objectives.pretrain import Pretrain
from tests import drawn
from tests.test_models import MAE, make_config

MODELS = {
    "mae": (spellings.MAE, dict(MAE)),
    "cross": (spellings.MAE, {}),
    "cross with self-attention": (
        spellings.MAE, dict(model__decoder__self_attention=True)
    ),
    "huggingface": (spellings.HUGGINGFACE_MAE, dict(MAE)),
}


def _variables(**changes):
    objective = Pretrain(make_config(**changes))
    variables = drawn.variables(objective.init)
    # Nothing is zero or one, so that nothing can be exchanged unseen.
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), variables)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    table, changes = MODELS[request.param]
    return table, _variables(**changes)


def test_there_and_back_every_tensor_is_the_same(model):
    table, variables = model
    theirs, left_over = spellings.to_theirs(
        table, names.tensors_of(variables), patch_size=4
    )
    assert not left_over
    back, left_over = spellings.to_ours(table, theirs)
    assert not left_over
    read = names.variables_of(back, variables, table=table)
    jax.tree.map(np.testing.assert_array_equal, read, variables)


def test_shapes_are_known_before_tensors_are_read(model):
    table, variables = model
    theirs, _ = spellings.to_theirs(table, names.tensors_of(variables), patch_size=4)
    for value in theirs.values():
        assert value.read().shape == value.shape
        assert value.read().flags.c_contiguous


def test_layouts_are_those_of_pytorch():
    variables = _variables()
    encoder = variables["params"]["encoder"]
    theirs, _ = spellings.to_theirs(
        spellings.MAE, names.tensors_of(variables), patch_size=4
    )
    kernel = encoder["patch_embed"]["proj"]["kernel"]  # (row column channel) x out
    np.testing.assert_array_equal(
        theirs["patch_embed.proj.weight"].read()[:, 2, 1, 3],
        kernel[(1 * 4 + 3) * 3 + 2],
    )
    np.testing.assert_array_equal(
        theirs["blocks.1.mlp.fc1.weight"].read(), encoder["blocks_1"]["mlp"]["fc1"][
            "kernel"].T,
    )
    table = variables["constants"]["encoder"]["pos_embed"]
    np.testing.assert_array_equal(theirs["pos_embed"].read(), table[None])
    np.testing.assert_array_equal(
        theirs["wfm.linear.weight"].read(), variables["params"]["fusion"]["kernel"].T
    )


def test_huggingface_keeps_queries_keys_and_values_apart():
    variables = _variables(**MAE)
    theirs, _ = spellings.to_theirs(
        spellings.HUGGINGFACE_MAE, names.tensors_of(variables), patch_size=4
    )
    block = variables["params"]["encoder"]["blocks_2"]["attn"]["qkv"]
    prefix = "vit.encoder.layer.2.attention.attention"
    for i, part in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(
            theirs[f"{prefix}.{part}.weight"].read(),
            block["kernel"][:, 16 * i : 16 * (i + 1)].T,
        )
        np.testing.assert_array_equal(
            theirs[f"{prefix}.{part}.bias"].read(), block["bias"][16 * i : 16 * (i + 1)]
        )


def test_a_part_without_its_others_is_left_over():
    one = {"vit.encoder.layer.0.attention.attention.key.bias": tensor.of_array(
        np.zeros(4, np.float32)
    )}
    ours, left_over = spellings.to_ours(spellings.HUGGINGFACE_MAE, one)
    assert ours == {} and left_over == list(one)


@pytest.mark.parametrize("name", [
    "blocks.01.norm1.weight", "blocks..norm1.weight", "blocks.x.norm1.weight",
    "blocks.0.norm1.weight.more", "module.cls_token", "blocks.-1.norm1.weight",
])
def test_names_that_only_resemble_ours_are_left_over(name):
    value = {name: tensor.of_array(np.zeros(4, np.float32))}
    assert spellings.to_ours(spellings.MAE, value) == ({}, [name])


def test_a_tensor_of_another_rank_is_left_over_and_not_transposed():
    value = {"head.weight": tensor.of_array(np.zeros((3, 4, 1), np.float32))}
    assert spellings.to_ours(spellings.TIMM, value) == ({}, ["head.weight"])


def test_a_misfit_lists_every_difference_under_their_names():
    variables = _variables(**MAE)
    theirs, _ = spellings.to_theirs(
        spellings.MAE, names.tensors_of(variables), patch_size=4
    )
    del theirs["norm.bias"]
    theirs["extra"] = tensor.of_array(np.zeros(3, np.float32))
    theirs["mask_token"] = tensor.of_array(np.zeros((1, 1, 7), np.float32))
    ours, left_over = spellings.to_ours(spellings.MAE, theirs)
    with pytest.raises(ConversionError) as error:
        names.variables_of(
            ours, variables, table=spellings.MAE, left_over=left_over, reason="a test"
        )
    text = str(error.value)
    assert "only in the model (1):\n    norm.bias" in text
    assert "only in the file (1):\n    extra" in text
    assert "mask_token: (1, 1, 7), expected (1, 1, 8)" in text
    assert text.endswith("Likely reason: a test.")


def test_half_precision_becomes_the_models_type():
    variables = _variables()
    halves = {
        name: value.then(lambda x: x.astype(np.float16))
        for name, value in names.tensors_of(variables).items()
    }
    read = names.variables_of(halves, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}


def test_the_class_row_of_a_table_can_be_ignored():
    table = tensor.of_array(np.ones((5, 2), np.float32))
    np.testing.assert_array_equal(
        names.zero_class_row(table).read(), [[0, 0], *[[1, 1]] * 4]
    )
