"""How the state lies on the devices: rules, the automatic choice, the same training."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from benchmarks import step as benchmark_step
from crossmae_jax import train_step
from crossmae_jax.cost import collectives, counting, estimate
from crossmae_jax.distributed import hardware, parallel, sharding
from crossmae_jax.objectives import OBJECTIVES
from crossmae_jax.optim import optimizers

SMALL = [
    "model.encoder.size='W64-D2-H2/16'", "model.decoder.dim=32",
    "model.decoder.depth=2", "model.decoder.num_heads=2", "data.batch_size=16",
    "model.dtype='float32'",
]


def load(*overrides, path="configs/vitb_cross.py"):
    return benchmark_step.load_config(path, overrides=[*SMALL, *overrides])


def lowered(*overrides, devices=None, **kwargs):
    devices = jax.devices() if devices is None else devices
    return estimate.lower_step(load(*overrides, **kwargs), devices)


def specs(*overrides, **kwargs):
    """Returns how every tensor of a state lies, by its name."""
    state = lowered(*overrides, **kwargs).state
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


@pytest.mark.parametrize("path", ["configs/vitb_cross.py", "configs/vitb_mae_prmim.py"])
def test_kernels_and_their_moments_are_cut_and_nothing_else(path):
    cut = 0
    for name, (leaf, lies) in specs("mesh.fsdp=4", path=path).items():
        matrix = name.endswith("/kernel") and leaf.ndim == 2 and "fusion" not in name
        expected = PartitionSpec("fsdp") if matrix else PartitionSpec()
        assert lies.spec == expected, name
        cut += matrix
    # Weights and two moments of: a block 4, a cross-block 5, patches and prediction;
    # MAE's blocks have 4, and the embedding of the decoder.
    assert cut == 3 * (2 * 4 + 2 * (5 if "cross" in path else 4) + 2 + ("mae" in path))


def test_inputs_that_do_not_divide_leave_the_outputs_to_be_cut():
    found = specs("mesh.fsdp=8", "model.encoder.size='W64-D2-H2/14'")
    kernel = found["variables/params/encoder/patch_embed/proj/kernel"]
    assert kernel[0].shape == (588, 64)
    assert kernel[1].spec == PartitionSpec(None, "fsdp")


def test_one_copy_for_each_device_is_whole_everywhere():
    found = specs("mesh.fsdp=1").values()
    assert all(lies.spec == PartitionSpec() for _, lies in found)


@pytest.mark.parametrize("overrides", [
    ["mesh.fsdp=2", "model.remat='none'"],
    ["mesh.fsdp=4", "optim.accum_steps=2", "optim.clip_norm=1.0"],
    ["mesh.fsdp=8", "model.encoder.size='W64-D1-H2/14'", "model.remat='full'"],
], ids=str)
def test_training_is_the_same_however_the_state_lies(overrides):
    def losses(*overrides):
        config = load(
            "model.encoder.size='W64-D1-H2/16'", "model.decoder.depth=1", *overrides
        )
        objective = OBJECTIVES[config.objective](config)
        key = jax.random.key(0, impl="threefry2x32")
        schedule = lambda step: jax.numpy.float32(1e-3)  # noqa: E731
        tx = optimizers.make_optimizer(config, schedule)
        state = train_step.abstract_state(objective, tx, key)
        mesh, _ = sharding.make_mesh(config, state)
        init, step = train_step.compile_steps(
            objective, tx, mesh, schedule=schedule, key=key,
            accum_steps=config.optim.accum_steps,
        )
        state, found = init(key), []
        noise = np.random.default_rng(0)
        for _ in range(3):
            state, logged = step(state, parallel.place_batch(mesh, {
                "image": noise.integers(0, 256, (16, 224, 224, 3), np.uint8),
                "label": np.zeros(16, np.int32), "sample": np.arange(16, dtype="u4"),
            }))
            found.append((float(logged["loss"]), float(logged["grad_norm"])))
        lies = jax.tree.map(lambda x: x.sharding, state)
        assert lies == sharding.shardings(mesh, state)  # where the next step wants it
        return found

    whole = [each for each in overrides if "mesh" not in each]
    np.testing.assert_allclose(
        losses(*overrides), losses("mesh.fsdp=1", *whole), rtol=2e-5
    )


@pytest.mark.parametrize(("memory", "fsdp", "text"), [
    (40.0, 1, "8 data x 1 fsdp; weights and moments whole on every device"),
    (3.99, 2, "4 data x 2 fsdp; weights and moments cut over 2 devices, auto"),
    (0.55, 8, "1 data x 8 fsdp; weights and moments cut over 8 devices, auto"),
    (0.1, 8, "25%, but there are no more devices"),
    (None, 1, "the memory of these devices is not known"),
])
def test_the_state_takes_at_most_a_quarter_of_a_device_if_it_can(
    memory, fsdp, text, monkeypatch
):
    config = load()
    # 62.5 million parameters, two moments and the gradient: a billion bytes.
    params = {"kernel": jax.ShapeDtypeStruct((25, 10**7 // 4), np.float32)}
    state = train_step.TrainState(
        jax.ShapeDtypeStruct((), np.int32), {"params": params}, (params, params)
    )
    monkeypatch.setattr(
        hardware, "memory", lambda device: memory and int(memory * 10**9)
    )
    mesh, line = sharding.make_mesh(config, state)
    assert mesh.shape == {"data": 8 // fsdp, "fsdp": fsdp}
    assert text in line


@pytest.mark.parametrize("fsdp", [3, 16, -1])
def test_a_number_that_does_not_divide_the_devices_is_refused(fsdp):
    with pytest.raises(ValueError, match="8 devices; give one of 1, 2, 4, 8, or 0"):
        sharding.make_mesh(load(f"mesh.fsdp={fsdp}"), None)


def test_groups_that_straddle_are_said_to(monkeypatch):
    monkeypatch.setattr(sharding, "_compact", lambda devices: [1, 4, 8])
    _, line = sharding.make_mesh(load("mesh.fsdp=2"), None)
    assert "copies lie across hosts" in line
    _, line = sharding.make_mesh(load("mesh.fsdp=4"), None)
    assert "across" not in line


def test_whole_weights_cost_exactly_one_sum_of_the_gradients():
    step = lowered("mesh.fsdp=1")
    (only,) = collectives.read(step.step.compile().as_text(), 8)
    counted = counting.count(load())
    trained = counted.params - counted.others["constants"]
    assert (only.kind, only.count) == ("all-reduce", 1)
    assert 0 <= only.num_bytes - 4 * trained < 64  # the loss, and what is logged
