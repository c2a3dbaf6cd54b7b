"""Scaled dot-product attention, the one function that every model calls.

    out = softmax(q k^T / sqrt(d) + bias) v        with the softmax in float32

Axis order is `[b, length, heads, head_dim]`. Products accumulate in float32 whatever
the input type, and the result has the type of `q`. Queries and keys may differ in
number: self-attention and cross-attention are the same function.

Each platform has implementations in the order in which they are tried. Which of them
takes the shapes is settled as the model is traced; which platform it is, as the trace
is compiled, perhaps on another machine (`jax.lax.platform_dependent`). What was chosen,
and why, can be recorded; `attention_check` compares it with float32.
"""

import contextlib
import contextvars
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from crossmae_jax.ops import attention_cudnn, attention_tpu, attention_xla


def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    bias: Float[Array, "#b #h q k"] | None = None,
    impl: str | None = None,
) -> Float[Array, "b q h d"]:
    """Averages the values for each query, weighted by its products with the keys.

    Args:
      impl: "xla", "tpu" or "cudnn", which raises NotImplementedError if it does not
        take these arrays; None takes the platform's first that does.
    """
    if impl is not None:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(
                f"Unknown impl={impl!r}. Known: {', '.join(sorted(IMPLEMENTATIONS))}."
            )
        return _forced(impl, q, k, v, bias)
    arrays = tuple(
        x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for x in (q, k, v, bias)
    )
    chosen = {platform: _choose(platform, arrays) for platform in ORDER}
    if (recorded := _recorded.get()) is not None:
        here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        recorded.append(chosen.get(here, Choice(arrays, "xla", ())))
    others = {
        platform: IMPLEMENTATIONS[choice.impl].function
        for platform, choice in chosen.items() if choice.impl != "xla"
    }
    if not others:
        return attention_xla.attention(q, k, v, bias)
    return jax.lax.platform_dependent(
        q, k, v, bias, default=attention_xla.attention, **others
    )


class Choice(NamedTuple):
    """Which implementation was taken for some arrays, and why.

    Attributes:
      arrays: q, k, v and bias, which may be None; their shapes and types.
      impl: the implementation for the platform that JAX runs on.
      reasons: why each before it did not take them, "cudnn: ...".
    """

    arrays: tuple[jax.ShapeDtypeStruct | None, ...]
    impl: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """Returns `attention 50 x 50, 12 heads of 64, bfloat16: xla; not cudnn: ...`.

        The number of images is left out; a bias stands there as `float32 bias 1 x 12`
        or, if each image has its own, `b x 12`.
        """
        q, k, _, bias = self.arrays
        extra = ""
        if bias is not None:
            images = 1 if bias.shape[0] == 1 else "b"
            extra = f", {bias.dtype} bias {images} x {bias.shape[1]}"
        return (
            f"attention {q.shape[1]} x {k.shape[1]}, {q.shape[2]} heads of"
            f" {q.shape[3]}, {q.dtype}{extra}: "
            + "; not ".join((self.impl, *self.reasons))
        )


_recorded: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "recorded", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects what is chosen for every attention traced meanwhile, in this order.

    What JAX has traced before it does not trace again: give it new functions.

    Example:
      with recording() as choices:
          jax.eval_shape(jax.jit(step), state, batch)
    """
    choices: list[Choice] = []
    token = _recorded.set(choices)
    try:
        yield choices
    finally:
        _recorded.reset(token)


def _choose(platform, arrays):
    """Returns the platform's first implementation that takes the arrays."""
    reasons = []
    for name in ORDER[platform]:
        try:
            IMPLEMENTATIONS[name].check(*arrays)
            break
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    return Choice(arrays, name, tuple(reasons))


def _forced(impl, q, k, v, bias):
    function, check, platform = IMPLEMENTATIONS[impl]
    check(q, k, v, bias)
    if platform is None:
        return function(q, k, v, bias)
    # Without a default JAX refuses other platforms, with a NotImplementedError.
    return jax.lax.platform_dependent(q, k, v, bias, **{platform: function})


def _check_tpu(q, k, v, bias):
    attention_tpu.check(q, k, v, bias)
    if importlib.util.find_spec("libtpu") is None:
        raise NotImplementedError("The TPU compiler was not found; install jax[tpu].")
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        raise NotImplementedError(
            f"There are {jax.device_count()} devices, but no mesh is in use to share a"
            " kernel's work by; jit the function as distributed.parallel.within does."
        )


class Implementation(NamedTuple):
    """A way to compute attention.

    Attributes:
      function: of q, k, v and bias.
      check: of the same, or of their shapes and types; raises NotImplementedError, with
        the reason, for what the function does not take.
      platform: the only one that it is for, as JAX calls it; None: all.
    """

    function: Callable[..., Float[Array, "b q h d"]]
    check: Callable[..., None]
    platform: str | None


IMPLEMENTATIONS = {
    "xla": Implementation(attention_xla.attention, lambda q, k, v, bias: None, None),
    "tpu": Implementation(attention_tpu.attention, _check_tpu, "tpu"),
    "cudnn": Implementation(attention_cudnn.attention, attention_cudnn.check, "cuda"),
}
# By platform, in the order in which they are tried; one not named here has "xla".
ORDER = {
    "tpu": ("tpu", "xla"),
    "cuda": ("cudnn", "xla"),
    "cpu": ("xla",),
}
