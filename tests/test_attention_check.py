"""A run says which kernels it takes, and does not start with one that is wrong."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from configs import digits_cross
from crossmae_jax import train
from crossmae_jax.distributed import parallel
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.ops import (
    attention,
    attention_check,
    attention_cudnn,
    attention_tpu,
    attention_xla,
)
from tests import attention_cases

CASES = attention_cases.SMALL
PER_IMAGE = attention_cases.Case("per image", 9, 9, 2, 8, "per image")


@pytest.fixture
def take(monkeypatch):
    """Returns a function that makes another one the CPU's kernel."""
    def take(kernel, check=lambda *arrays: None):
        new = attention.Implementation(kernel, check, None)
        monkeypatch.setitem(attention.IMPLEMENTATIONS, "new", new)
        monkeypatch.setitem(attention.ORDER, "cpu", ("new", "xla"))

    return take


def _xla(q, k, v, bias=None):
    return attention_xla.attention(q, k, v, bias)


def _choices(*cases, dtype=jnp.bfloat16, images=32):
    """Returns what is chosen for cases, traced as in a run."""
    mesh = parallel.make_mesh()
    with attention.recording() as choices:
        for case in cases:
            q, k = (
                jax.ShapeDtypeStruct((images, n, case.num_heads, case.dim), dtype)
                for n in (case.queries, case.keys)
            )
            bias = None
            if case.bias is not None:
                count = {"shared": 1, "per image": images}[case.bias]
                shape = (count, case.num_heads, case.queries, case.keys)
                bias = jax.ShapeDtypeStruct(shape, jnp.float32)
            traced = parallel.within(mesh, lambda q, k, bias: attention.attention(
                q, k, k, bias=bias
            ))
            jax.eval_shape(traced, q, k, bias)
    return choices, mesh


def _check(*cases, **kwargs):
    choices, mesh = _choices(*cases, **kwargs)
    attention_check.check(choices, mesh=mesh)


def _hiding_nothing(q, k, v, bias):
    """As if cuDNN were not told where the keys end."""
    padded = [jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (k, v)]
    if bias is not None:
        bias = jnp.pad(bias, [(0, 0), (0, 0), (0, 0), (0, 1)])
    return _xla(q, *padded, bias)


def _wrong_gradient_of(part):
    """Makes attention whose gradient of one argument is wrong by a tenth."""
    @jax.custom_vjp
    def kernel(*arrays):
        return _xla(*arrays)

    def backward(saved, g):
        gradients = list(jax.vjp(_xla, *saved)[1](g))
        gradients[part] *= 1.1
        return tuple(gradients)

    kernel.defvjp(lambda *arrays: (_xla(*arrays), arrays), backward)
    return kernel


def _wrong_for(condition):
    """Makes attention that is wrong by a tenth where a condition on q holds."""
    return lambda q, k, v, bias: _xla(q, k, v, bias) * (1.1 if condition(q) else 1)


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 2e-2), ("float32", 1e-5)])
def test_the_kernels_of_the_tpu_pass_with_room_to_spare(take, capsys, dtype, limit):
    take(functools.partial(attention_tpu.attention, interpret=True))
    _check(CASES[0], PER_IMAGE, dtype=dtype, images=8)
    *_, line = capsys.readouterr().out.splitlines()
    assert "new against float32 on 2 kinds of attention" in line
    error, allowed = re.search(r"off by (\S+) .* allowed (\S+)$", line).groups()
    assert 0 < float(error) < limit / 3 and float(allowed) == limit


WRONG = {
    "a padded key counts": _hiding_nothing,
    "no scale": lambda q, k, v, bias: _xla(q * q.shape[-1] ** 0.5, k, v, bias),
    "the last key is lost": lambda q, k, v, bias: _xla(
        q, k[:, :-1], v[:, :-1], None if bias is None else bias[..., :-1]
    ),
    "the last image is lost": lambda *arrays: _xla(*arrays).at[-1].set(0),
    "the last query is lost": lambda *arrays: _xla(*arrays).at[:, -1].set(0),
    "heads are exchanged": lambda *arrays: _xla(*arrays)[:, :, ::-1],
    "not finite": lambda *arrays: _xla(*arrays).at[0, 0, 0, 0].set(jnp.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_noticed_even_in_bfloat16(take, wrong):
    take(WRONG[wrong])
    with pytest.raises(attention_check.KernelError, match="the output by"):
        _check(CASES[0])


@pytest.mark.parametrize("part, name", [(0, "q"), (1, "k"), (3, "the bias")])
def test_a_kernel_wrong_in_one_gradient_is_noticed(take, part, name):
    take(_wrong_gradient_of(part))
    said = f"input, the gradient of {name} by 0.[01][0-9]* of its largest"
    with pytest.raises(attention_check.KernelError, match=said):
        _check(PER_IMAGE)


def test_a_kernel_wrong_in_bfloat16_only_is_noticed_there(take):
    take(_wrong_for(lambda q: q.dtype == jnp.bfloat16))
    _check(CASES[0], dtype=jnp.float32)
    with pytest.raises(attention_check.KernelError, match="bfloat16: new"):
        _check(CASES[0])


def test_a_kernel_wrong_at_one_of_the_shapes_is_noticed(take):
    take(_wrong_for(lambda q: q.shape[1] == 147))
    wrong = next(case for case in CASES if case.queries == 147)
    with pytest.raises(attention_check.KernelError, match="attention 147 x 50, 2 he"):
        _check(CASES[0], wrong)


def test_a_bias_that_is_left_out_is_noticed(take):
    take(lambda q, k, v, bias: _xla(q, k, v))
    _check(CASES[0])
    with pytest.raises(attention_check.KernelError, match="float32 bias b x 2: new"):
        _check(PER_IMAGE)


def test_the_gradients_of_a_single_key_are_zero_and_no_error(take):
    take(lambda q, k, v, bias: _xla(q, k, v))
    _check(attention_cases.Case("", 4, 1, 2, 8), dtype=jnp.float32)


def test_each_device_takes_at_most_the_images_of_the_run(take):
    seen = []

    def kernel(q, k, v, bias):
        seen.append(q.shape[0])
        return _xla(q, k, v, bias)

    take(kernel)
    for images in (8, 24, 8 * 100):
        choices, mesh = _choices(CASES[0], images=images)
        seen.clear()
        attention_check.check(choices, mesh=mesh)
        assert set(seen) == {min(images, 8 * 16)}


def test_a_choice_says_what_was_chosen_and_why(take):
    take(attention_cudnn.attention, attention_cudnn.check)
    small, biased = _choices(CASES[0], PER_IMAGE, dtype=jnp.float32)[0]
    said = "new: cuDNN's kernels take bfloat16 or float16, one type for all, but"
    assert str(small).startswith(
        f"attention 50 x 50, 4 heads of 64, float32: xla; not {said}"
    )
    assert "2 heads of 8, float32, float32 bias b x 2: xla; not" in str(biased)


def test_what_plain_xla_computes_is_not_compared(monkeypatch, capsys):
    monkeypatch.delattr(attention_check, "_errors")
    _check(*CASES[:2], CASES[0])
    assert capsys.readouterr().out == (
        "attention 50 x 50, 4 heads of 64, bfloat16: xla\n"
        "attention 65 x 65, 2 heads of 80, bfloat16: xla\n"
    )


def test_only_the_first_process_prints(monkeypatch, take, capsys):
    take(_xla)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _check(CASES[0])
    assert capsys.readouterr().out == ""


def _config(digits_dir, **changes):
    """Returns a run of two steps with pictures and neighbours at its end."""
    config = digits_cross.get_config()
    config.evals = dict(
        knn=dict(every_epochs=0.0, k=5, temperature=0.07, max_train_images=100),
        reconstruction=dict(every_epochs=0.0, num_images=3),
    )
    config.update_from_flattened_dict({
        "epochs": 0.14, "baselines": False, "model.encoder.size": "W16-D2-H2/4",
        "model.decoder.dim": 16, "model.decoder.depth": 1, "model.decoder.num_heads": 2,
        "optim.warmup_epochs": 0.05, "data.batch_size": 96,
        "data.image_size": (16, 16), "data.data_dir": digits_dir, **changes,
    })
    return config


# A class token and 4 visible patches; 8 to predict, 12 in pictures; 16 in features.
LINES = [
    f"attention {queries} x {keys}, 2 heads of 8, float32"
    for queries, keys in ((5, 5), (8, 5), (17, 17), (12, 5))
]


def test_a_run_takes_a_good_kernel_says_so_once_and_refuses_a_bad_one(
    digits_dir, tmp_path, take, capsys, monkeypatch
):
    meshes, traced = [], []

    def check(q, k, v, bias):
        if q.shape[0] > 1:  # else the weights are drawn, on no mesh
            meshes.append(attention_tpu.mesh_in_use())

    def counted(name):
        function = getattr(Pretrain, name)

        def call(*args):
            traced.append(name)
            return function(*args)

        monkeypatch.setattr(Pretrain, name, call)

    for name in ("loss", "_features", "_reconstruct"):
        counted(name)
    take(_xla, check)
    train.run(_config(digits_dir), tmp_path)
    out = capsys.readouterr().out
    said = [line for line in out.splitlines() if line.startswith("attention")]
    assert said == [f"{line}: new" for line in LINES]
    assert out.count("checked new against float32 on 4 kinds of attention") == 1
    # The step and all evaluators saw the devices of the mesh, and what was traced to
    # find their shapes was not traced again to run them.
    assert {mesh and mesh.size for mesh in meshes} == {8}
    assert sorted(traced) == ["_features", "_reconstruct", "loss"]

    train.run(_config(digits_dir), tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("RESUMED at step 2 of 2 from ")
    said = [line for line in out.splitlines() if line.startswith("attention")]
    assert said == [f"{LINES[i]}: new" for i in (2, 0, 3)]  # nothing left to train


    take(_wrong_for(lambda q: q.shape[1] == 17))
    with pytest.raises(attention_check.KernelError, match="attention 17 x 17"):
        train.run(_config(digits_dir), tmp_path)


def test_a_wrong_kernel_stops_a_run_before_its_first_step(digits_dir, tmp_path, take):
    config = _config(digits_dir, **{"optim.accum_steps": 2})
    config.evals = {}
    take(_wrong_gradient_of(2))
    with pytest.raises(attention_check.KernelError, match="gradient of v by 0.1"):
        train.run(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
