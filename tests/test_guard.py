"""A step that is not finite changes nothing but the step, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import guard as guard_benchmark
from benchmarks import step as step_benchmark
from crossmae_jax import train_step
from crossmae_jax.data import pipeline
from crossmae_jax.distributed import parallel, sharding
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.objectives.objective import Aux
from crossmae_jax.optim import layerwise, optimizers

KEY = jax.random.key(0)
NAN, INF = float("nan"), float("inf")
GOOD = {"image": 1.0, "slope": 0.0, "root": 1.0, "extra": 0.0}


class Fragile:
    """An objective with a number that batches can make not finite in several ways."""

    model, starts, outputs = None, {"params": ""}, {}

    def init(self, key):
        params = {"encoder": {"w": jnp.ones(())}, "head": {"w": jnp.ones((2,))}}
        return {"params": params, "seen": {"sum": jnp.zeros(())}, "table": {"t": KEY}}

    def loss(self, variables, batch, key):
        w = variables["params"]["encoder"]["w"]
        value = ((w - batch["image"]) ** 2).mean()
        value += (variables["params"]["head"]["w"] * batch["slope"].mean()).sum()
        value += jnp.sqrt(w * batch["root"]).mean()  # of slope infinity at 0
        seen = variables["seen"]["sum"] + batch["image"].mean() + batch["extra"].sum()
        return value, Aux({}, {"seen": {"sum": seen}})


def batch_of(mesh, *, row=3, **changes):
    """Returns a batch of eight, of which changes are of one row alone."""
    values = {name: np.full(8, value, np.float32) for name, value in GOOD.items()}
    for name, value in changes.items():
        values[name][row] = value
    return parallel.place_batch(mesh, values)


def rate(step):
    return 0.01 * (step + 1.0)


def compiled(devices=8, *, tx=None, **options):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    tx = optax.adam(rate) if tx is None else tx
    init, step = train_step.compile_steps(
        Fragile(), tx, mesh, schedule=rate, key=KEY, **options
    )
    return init(KEY), step, mesh


def config_of(*changes):
    """Returns settings of a classifier of one block."""
    return step_benchmark.load_config("configs/finetune_digits.py", overrides=[
        "model.encoder.size=W16-D1-H2/4", "data.num_classes=10", *changes
    ])


def values_of(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(
            x.dtype, jax.dtypes.prng_key
        ) else x) for x in jax.tree.leaves(tree)
    ]


def assert_same(ours, theirs):
    for a, b in zip(values_of(ours), values_of(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


BAD = {
    "loss": dict(image=NAN), "infinite loss": dict(image=INF),
    "gradient": dict(root=0.0), "length of the gradient": dict(slope=1e21),
    "statistics": dict(extra=INF),
}


@pytest.mark.parametrize("devices, accum_steps", [(1, 1), (8, 1), (1, 4), (4, 2)])
def test_whatever_is_not_finite_leaves_weights_moments_and_statistics(
    devices, accum_steps
):
    state, step, mesh = compiled(devices, accum_steps=accum_steps)
    state, _ = step(state, batch_of(mesh))
    for number, (what, changes) in enumerate(BAD.items(), start=1):
        before = jax.device_get(
            (state.variables["params"], state.variables["seen"], state.opt_state[0])
        )
        state, logged = step(state, batch_of(mesh, **changes))
        after = (
            state.variables["params"], state.variables["seen"], state.opt_state[0]
        )
        assert_same(before, after)
        assert state.step == number + 1
        assert state.skipped == {"total": number, "in_a_row": number}
        assert logged["skipped_steps"] == logged["skipped_in_a_row"] == number
        finite = bool(np.isfinite(logged["loss"]))
        assert finite == (what not in ("loss", "infinite loss")), what
    state, logged = step(state, batch_of(mesh))
    assert state.skipped == {"total": number, "in_a_row": 0}
    assert logged["skipped_steps"] == number and logged["skipped_in_a_row"] == 0
    assert state.opt_state[0].count == 2  # of Adam's moments


def test_after_a_skipped_step_the_rate_is_that_of_the_step():
    state, step, mesh = compiled(1, tx=optax.sgd(rate))
    state, _ = step(state, batch_of(mesh, image=NAN))
    before = float(state.variables["params"]["encoder"]["w"])
    state, logged = step(state, batch_of(mesh))
    # At w = 1 the slope is that of the root alone, 1 / 2.
    assert logged["lr"] == pytest.approx(0.02)
    moved = before - float(state.variables["params"]["encoder"]["w"])
    assert moved == pytest.approx(0.02 * 0.5, rel=1e-5)


@pytest.mark.parametrize("changes", [
    [], ["optim.clip_norm=1.0"], ["optim.name=lars"],
    ["tune_blocks=0", "optim.layer_decay=0.5", "optim.clip_norm=1.0"],
])
def test_schedules_of_all_optimisers_go_on_and_their_moments_do_not(changes):
    config = config_of(*changes)
    schedule = optimizers.make_schedule(config, steps_per_epoch=10.0)
    state, step, mesh = compiled(1, tx=optimizers.make_optimizer(config, schedule))
    state, _ = step(state, batch_of(mesh))
    before = jax.device_get(state.opt_state)
    state, _ = step(state, batch_of(mesh, image=NAN))

    def is_count(node):
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = (jax.tree.leaves(x, is_leaf=is_count) for x in (before, state.opt_state))
    counts = 0
    for old, new in zip(*nodes, strict=True):
        if is_count(old):
            counts += 1
            assert (old.count, new.count) == (1, 2)
        else:
            np.testing.assert_array_equal(old, new)
    assert counts == 1


def test_finite_steps_are_bit_for_bit_those_without_a_guard():
    state, step, mesh = compiled(8, accum_steps=2)
    update = jax.jit(train_step.make_update(
        Fragile(), optax.adam(rate), schedule=rate, key=KEY, accum_steps=2
    ))
    ours, theirs = state, train_step.init_state(Fragile(), optax.adam(rate), KEY)
    for number in range(3):
        batch = batch_of(mesh, image=float(number))
        theirs, logged = update(theirs, batch)
        ours, _ = step(ours, batch)
        assert "skipped_steps" not in logged
    assert_same(ours, theirs)


def test_after_so_many_in_a_row_nothing_changes_any_more():
    state, step, mesh = compiled(1, max_skipped_in_a_row=2)
    state, _ = step(state, batch_of(mesh, image=NAN))
    state, _ = step(state, batch_of(mesh))
    for _ in range(2):
        state, _ = step(state, batch_of(mesh, image=NAN))
    before = jax.device_get((state.step, state.opt_state, state.skipped))
    assert before[0] == 4 and before[2] == {"total": 3, "in_a_row": 2}
    for changes in ({}, {"image": NAN}):
        state, logged = step(state, batch_of(mesh, **changes))
        assert_same(before, (state.step, state.opt_state, state.skipped))
        assert logged["skipped_in_a_row"] == 2
    assert np.isfinite(state.variables["params"]["encoder"]["w"])


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_skipped_in_a_row=0 must be 1 or more"):
        compiled(1, max_skipped_in_a_row=0)


class Poisoned(Classify):
    """A classifier whose images are multiplied by a number that comes with them."""

    def normalize(self, batch):
        factor = batch.get("factor", jnp.ones(()))
        return super().normalize(batch) * factor.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_real_classifier_with_a_batch_norm_and_its_state_cut_over_devices(
    accum_steps
):
    config = config_of(
        "model.head_norm=batch", "data.batch_size=16",
        f"optim.accum_steps={accum_steps}", "mesh.fsdp=2",
    )
    objective = Poisoned(config)
    schedule = optimizers.make_schedule(config, steps_per_epoch=1.0)
    tx = optimizers.make_optimizer(config, schedule)
    mesh, _ = sharding.make_mesh(config, train_step.abstract_state(objective, tx, KEY))
    init, step = train_step.compile_steps(
        objective, tx, mesh, schedule=schedule, key=KEY, accum_steps=accum_steps
    )
    rng, state = np.random.default_rng(0), init(KEY)
    blank = pipeline.blank_batch(config.data, batch_size=16)
    for factor, skipped in ((1.0, 0), (INF, 1), (1.0, 1)):
        before = jax.device_get((state.variables, state.opt_state))
        batch = blank | {
            "image": rng.integers(0, 256, blank["image"].shape, np.uint8),
            "label": rng.integers(0, 10, 16, np.int32),
            "sample": np.arange(16, dtype=np.uint32),
            "factor": np.ones(16, np.float32),
        }
        batch["factor"][5] = factor
        state, logged = step(state, parallel.place_batch(mesh, batch))
        changed = [
            not np.array_equal(a, b)
            for a, b in zip(
                values_of(before[0]), values_of(state.variables), strict=True
            )
        ]
        assert logged["skipped_steps"] == skipped
        assert (sum(changed) == 0) == (factor == INF)
        for leaf in values_of(state):
            assert np.isfinite(leaf).all()
    stats = jax.tree.leaves(state.variables["batch_stats"])
    assert len(stats) == 2 and all(np.abs(x).max() > 0 for x in stats)


@pytest.mark.parametrize("name, part", [
    ("encoder/blocks_3/attn/qkv/kernel", "encoder/blocks_3"),
    ("encoder/blocks_13/norm1/bias", "encoder/blocks_13"),
    ("decoder/decoder_blocks_0/mlp/fc1/kernel", "decoder/decoder_blocks_0"),
    ("encoder/patch_embed/proj/kernel", "encoder/patch_embed"),
    ("encoder/cls_token", "encoder"), ("head/kernel", "head"), ("scale", "scale"),
])
def test_a_tensor_belongs_to_its_block_or_module(name, part):
    assert layerwise.part(name) == part


def test_lengths_of_gradient_and_update_are_logged_for_each_part():
    state, step, mesh = compiled(8, tx=optax.sgd(rate), log_norms=True)
    _, logged = step(state, batch_of(mesh, slope=8.0))
    # The slope of the root is 1 / 2; a mean slope of 1 is that of each of two weights.
    expected = {
        "grad_norm/encoder": 0.5, "grad_norm/head": 2**0.5,
        "update_norm/encoder": 0.005, "update_norm/head": 0.01 * 2**0.5,
    }
    found = {name: float(x) for name, x in logged.items() if "norm/" in name}
    assert found == pytest.approx(expected, rel=1e-5)
    assert logged["grad_norm"] == pytest.approx((0.25 + 2) ** 0.5, rel=1e-5)


def test_the_benchmark_sets_the_guard_beside_no_guard(capsys):
    guard_benchmark.main([
        "--config=configs/finetune_digits.py", "--batch=8", "--steps=3",
        "--override=model.encoder.size=W16-D1-H2/4", "--override=data.num_classes=10",
    ])
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [
        "without", "guarded", "guarded, lengths of blocks"
    ]
    operations = [float(row[4]) for row in cells]
    assert operations == sorted(operations) and operations[0] == 1 < operations[1]
    assert "finetune_digits, batch 8, 3 steps in turns" in said
    assert "On the host" in said
