"""The classifier: initial head, batch norm, stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import losses
from crossmae_jax.distributed import parallel
from crossmae_jax.models import layers, vit
from tests import drawn
from tests.test_layerwise import make_classifier

RATE = 0.5


def _images(num=4):
    return jax.random.normal(jax.random.key(1), (num, 8, 8, 3))


def _dropping(remat="none", dtype=jnp.float32):
    model = make_classifier(
        encoder=dict(drop_path=RATE, remat=remat, dtype=dtype), head_std=1.0
    )
    return model, drawn.variables(model.init, _images(1))


def _apply(model, variables, key=None, num=4, **kwargs):
    rngs = {} if key is None else {"drop_path": jax.random.key(key)}
    return model.apply(variables, _images(num), rngs=rngs, **kwargs).logits


def test_nothing_is_dropped_without_a_key():
    model, variables = _dropping()
    whole = _apply(make_classifier(), variables)
    np.testing.assert_array_equal(_apply(model, variables), whole)
    np.testing.assert_array_equal(_apply(model, variables, train=True), whole)
    assert jnp.abs(_apply(model, variables, key=0) - whole).max() > 1e-3
    np.testing.assert_array_equal(_apply(make_classifier(), variables, key=0), whole)


def test_a_branch_is_left_out_or_divided_by_its_share_of_samples():
    """All four combinations of two branches occur, and nothing else."""
    block = layers.Block(8, 2, 2.0, drop_path=0.25)
    x = jax.random.normal(jax.random.key(0), (256, 3, 8))
    variables = drawn.variables(block.init, x)
    out = block.apply(variables, x, rngs={"drop_path": jax.random.key(2)})

    bound = block.bind(variables)
    branches = {
        "norm1": lambda x: bound.attn.attend(*bound.attn.project(x)),
        "norm2": bound.mlp,
    }

    def branch(norm, x):
        return branches[norm](getattr(bound, norm)(x)) / 0.75

    found = []
    for with_attention in (False, True):
        middle = x + with_attention * branch("norm1", x)
        for with_mlp in (False, True):
            expected = middle + with_mlp * branch("norm2", middle)
            found.append(jnp.abs(out - expected).max((1, 2)) < 1e-5)
    found = np.stack(found)
    np.testing.assert_array_equal(found.sum(0), 1)
    share = found.mean(1)
    expected = np.outer([0.25, 0.75], [0.25, 0.75]).ravel()
    error = 5 * np.sqrt(expected * (1 - expected) / 256)
    assert (np.abs(share - expected) < error).all(), share


def test_rates_rise_linearly_from_zero():
    assert vit.drop_path_rates(0.3, depth=4) == pytest.approx((0, 0.1, 0.2, 0.3))
    assert vit.drop_path_rates(0.3, depth=1) == (0.0,)
    model, variables = _dropping()
    maps = [
        model.bind(variables, rngs=rngs).encoder(_images()).maps
        for rngs in ({}, {"drop_path": jax.random.key(0)})
    ]
    # The first block keeps all.
    np.testing.assert_array_equal(maps[0][1].values, maps[1][1].values)
    assert jnp.abs(maps[0][2].values - maps[1][2].values).max() > 1e-3


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match=f"drop_path={rate} is no share of samples"):
        vit.drop_path_rates(rate, depth=2)


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_the_same_samples_are_dropped_when_blocks_are_computed_again(remat):
    def results(remat):
        model, variables = _dropping(remat)

        def loss(params):
            logits = _apply(model, {"params": params}, key=3)
            return (logits**2).sum(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        results(remat), results("none"),
    )


def test_what_is_dropped_does_not_depend_on_the_number_of_devices():
    model, variables = _dropping()
    mesh = parallel.make_mesh()
    assert mesh.size == 8

    @jax.jit
    def run(variables, images):
        return model.apply(
            variables, images, rngs={"drop_path": jax.random.key(5)}
        ).logits

    images = np.asarray(_images(16))
    one = run(variables, images)
    spread = run(
        jax.device_put(variables, parallel.replicated(mesh)),
        jax.device_put(images, parallel.batch_sharding(mesh)),
    )
    assert not spread.sharding.is_fully_replicated
    np.testing.assert_allclose(one, spread, atol=1e-5)


def test_in_bfloat16_survivors_are_scaled_without_a_bias():
    factor = jnp.full((64, 1, 1), 1 / 0.9)
    branch = jax.random.uniform(jax.random.key(0), (64, 16, 16), jnp.bfloat16, 1, 2)
    scaled = layers._survived(branch, factor)
    assert scaled.dtype == jnp.bfloat16
    share = (scaled.astype(jnp.float32) / branch.astype(jnp.float32)).mean()
    np.testing.assert_allclose(share, 1 / 0.9, rtol=2e-4)


@pytest.mark.parametrize("std", [2e-5, 0.01])
def test_a_new_head_has_normal_weights_and_no_bias(std):
    model = make_classifier(head_std=std).clone(num_classes=2000)
    head = model.init(jax.random.key(0), _images(1))["params"]["head"]
    np.testing.assert_allclose(head["kernel"].std(), std, rtol=0.03)
    np.testing.assert_array_equal(head["bias"], 0)


def test_a_batch_norm_learns_its_statistics_in_training_only():
    model = make_classifier(head_norm="batch", head_std=0.01)
    variables = model.init(jax.random.key(0), _images(4), train=True)
    assert set(variables) == {"params", "batch_stats"}
    assert set(variables["params"]) == {"encoder", "head"}
    np.testing.assert_array_equal(variables["batch_stats"]["batch_norm"]["var"], 1)
    features = model.apply(variables, _images()).features
    _, updated = model.apply(
        variables, _images(), train=True, mutable=["batch_stats"]
    )
    found = updated["batch_stats"]["batch_norm"]
    np.testing.assert_allclose(found["mean"], 0.1 * features.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        found["var"], 0.9 + 0.1 * features.var(0, ddof=1), atol=1e-6
    )
    _, same = model.apply(variables, _images(), mutable=["batch_stats"])
    assert not same.get("batch_stats") or jax.tree.all(jax.tree.map(
        jnp.array_equal, same["batch_stats"], variables["batch_stats"]
    ))


def test_a_batch_norm_sees_the_batches_of_all_devices():
    model = make_classifier(head_norm="batch", head_std=1.0)
    variables = drawn.variables(model.init, _images(1))
    mesh = parallel.make_mesh()

    @jax.jit
    def run(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    images = np.asarray(_images(16)) * np.arange(1, 17).reshape(16, 1, 1, 1)
    one = run(variables, images)
    spread = run(
        jax.device_put(variables, parallel.replicated(mesh)),
        jax.device_put(images, parallel.batch_sharding(mesh)),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, spread
    )


def test_a_training_batch_of_one_image_is_refused():
    model = make_classifier(head_norm="batch")
    variables = drawn.variables(model.init, _images(1))
    with pytest.raises(ValueError, match="A batch of 1 has no variance"):
        model.apply(variables, _images(1), train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("changes, message", [
    (dict(pool="max"), "Unknown model.pool 'max'. Known: cls, mean, no"),
    (dict(head_norm="layer"), "Unknown model.head_norm 'layer'. Known: none, batch."),
])
def test_unknown_choices_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        make_classifier(**changes).init(jax.random.key(0), _images(1))
    assert message in str(error.value)


def test_smoothed_labels_are_probabilities():
    targets = losses.smooth_labels(jnp.asarray([2, 0]), num_classes=4, smoothing=0.2)
    np.testing.assert_allclose(
        targets, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6
    )


def test_cross_entropy_is_computed_in_float32():
    logits = np.asarray([[1.5, 0.0, -1.0]])  # exact in bfloat16
    targets = jnp.asarray([[0.5, 0.25, 0.25]])
    loss = losses.cross_entropy(jnp.asarray(logits, jnp.bfloat16), targets)
    assert loss.dtype == jnp.float32
    expected = np.log(np.exp(logits).sum()) - (np.asarray(targets) * logits).sum()
    np.testing.assert_allclose(loss, [[expected]], rtol=1e-6)


