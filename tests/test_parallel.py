"""The mesh, and batches on it, over eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from crossmae_jax.distributed import parallel


def test_each_process_says_where_this_process_stands(capsys):
    assert parallel.announce() == "host 0/1, 8 local of 8 devices (cpu)"
    assert capsys.readouterr().out == "host 0/1, 8 local of 8 devices (cpu)\n"


def test_mesh_has_two_automatic_axes_over_all_devices():
    mesh = parallel.make_mesh(fsdp=4)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert mesh.devices.tolist() == [jax.devices()[:4], jax.devices()[4:]]


def test_batch_lies_in_order_with_an_equal_share_on_each_device():
    mesh = parallel.make_mesh()
    host = {"image": np.arange(16 * 2, dtype=np.uint8).reshape(16, 2),
            "sample": np.arange(16, dtype=np.uint32)}
    batch = parallel.place_batch(mesh, host)
    for name, array in batch.items():
        assert array.dtype == host[name].dtype
        assert array.sharding == parallel.batch_sharding(mesh)
        for number, shard in enumerate(array.addressable_shards):
            assert shard.device == mesh.devices.flat[number]
            np.testing.assert_array_equal(
                shard.data, host[name][2 * number:2 * number + 2]
            )


def test_gathers_that_explicit_axes_refuse_compile_on_the_mesh():
    mesh = parallel.make_mesh()
    batch = parallel.place_batch(mesh, {"x": np.ones((16, 5, 3), np.float32)})
    weights = jax.device_put(np.ones((3, 4), np.float32), parallel.replicated(mesh))

    def loss(weights, x):
        rows = jnp.arange(16)[:, None]
        picked = x[rows, jnp.array([[0, 2]])]
        return jnp.einsum("bnd,de->e", picked, weights).sum()

    gradient = jax.jit(jax.grad(loss), out_shardings=parallel.replicated(mesh))(
        weights, batch["x"]
    )
    np.testing.assert_array_equal(gradient, np.full((3, 4), 32.0))
    assert gradient.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("batch_size", "accum_steps", "text"),
    [
        (30, 1, "batch_size=30 does not divide over 8 devices; nearest: 24, 32."),
        (4, 1, "nearest: 8."),
        (0, 1, "nearest: 8."),
        (24, 2, "over 8 devices x 2 micro-batches; nearest: 16, 32."),
        (32, 0, "accum_steps=0; expected at least 1."),
    ],
)
def test_batch_that_does_not_divide_names_the_nearest(batch_size, accum_steps, text):
    with pytest.raises(ValueError) as caught:
        parallel.check_batch_size(
            batch_size, 8, accum_steps=accum_steps
        )
    assert text in str(caught.value)


def test_batch_that_divides_is_accepted():
    parallel.check_batch_size(32, 8, accum_steps=4)


def test_uneven_arrays_are_refused():
    mesh = parallel.make_mesh()
    with pytest.raises(ValueError, match=r"equally long; got \{'a': 8, 'b': 16\}"):
        parallel.place_batch(mesh, {"a": np.ones(8), "b": np.ones(16)})
    with pytest.raises(ValueError, match="nearest: 8, 16"):
        parallel.place_batch(mesh, {"a": np.ones(9, np.float32)})


def test_abstract_arrays_carry_shape_dtype_and_sharding():
    sharding = parallel.replicated(parallel.make_mesh())
    abstract = jax.eval_shape(lambda: {"w": jnp.ones((2, 3), jnp.bfloat16)})
    placed = parallel.with_sharding(abstract, sharding)["w"]
    assert (placed.shape, placed.dtype) == ((2, 3), jnp.bfloat16)
    assert placed.sharding == sharding
    assert sharding.spec == PartitionSpec()


def test_the_mesh_is_in_use_within_and_not_after():
    def step(x, *, scale):
        """Doubles."""
        assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
        return x * scale

    mesh = parallel.make_mesh(jax.devices()[:4])
    traced = parallel.within(mesh, step)
    assert jax.jit(traced)(3, scale=2) == 6
    assert traced.__name__ == "step"
    assert traced is not parallel.within(mesh, step)
    assert jax.sharding.get_abstract_mesh().empty
