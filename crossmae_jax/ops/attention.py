"""Scaled dot-product attention, the one function that every model calls.

    out = softmax(q k^T / sqrt(d) + bias) v        with the softmax in float32

Axis order is `[b, length, heads, head_dim]`. Products accumulate in float32 whatever
the input type, and the result has the type of `q`. Queries and keys may differ in
number: self-attention and cross-attention are the same function.

Each platform has implementations in the order in which they are tried. Which of them
takes the shapes is settled as the model is traced; which platform it is, as the trace
is compiled, perhaps on another machine (`jax.lax.platform_dependent`).
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from crossmae_jax.ops import attention_cudnn, attention_tpu


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
    # The mesh and the number of devices are in the key because "tpu" declines by them.
    key = (*arrays, attention_tpu.mesh_in_use(), jax.device_count())
    chosen = {platform: _choose(platform, *key) for platform in ORDER}
    others = {
        platform: IMPLEMENTATIONS[name]
        for platform, name in chosen.items() if name != "xla"
    }
    if not others:
        return _xla(q, k, v, bias)
    return jax.lax.platform_dependent(q, k, v, bias, default=_xla, **others)


@functools.cache
def _choose(platform, q, k, v, bias, mesh, num_devices):
    """Returns the first implementation that takes the arrays; logs it, and why."""
    reasons = []
    for name in ORDER[platform]:
        try:
            CHECKS[name](q, k, v, bias)
            break
        except NotImplementedError as reason:
            reasons.append(f"; not {name}: {reason}")
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform == here and jax.process_index() == 0:
        logging.info(
            "Attention %d x %d, %d heads of %d, %s%s: %s%s",
            q.shape[1], k.shape[1], *q.shape[2:], q.dtype,
            "" if bias is None else " with bias", name, "".join(reasons),
        )
    return name


def _forced(impl, q, k, v, bias):
    if impl == "xla":
        return _xla(q, k, v, bias)
    if impl == "tpu":
        attention_tpu.check(q, k, v, bias)
        _find_tpu_compiler()
    else:
        attention_cudnn.check(q, k, v, bias)
    # Without a default JAX refuses other platforms, with a NotImplementedError.
    only = {{"tpu": "tpu", "cudnn": "cuda"}[impl]: IMPLEMENTATIONS[impl]}
    return jax.lax.platform_dependent(q, k, v, bias, **only)


def _xla(q, k, v, bias):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def _find_tpu_compiler():
    if importlib.util.find_spec("libtpu") is None:
        raise NotImplementedError("The TPU compiler was not found; install jax[tpu].")


def _check_tpu(q, k, v, bias):
    _find_tpu_compiler()
    attention_tpu.check(q, k, v, bias)
    if attention_tpu.mesh_in_use() is None and jax.device_count() > 1:
        raise NotImplementedError(
            f"There are {jax.device_count()} devices, but no mesh is in use to share a"
            " kernel's work by; trace the model within"
            " jax.sharding.use_abstract_mesh(mesh.abstract_mesh)."
        )


IMPLEMENTATIONS = {
    "xla": _xla,
    "tpu": attention_tpu.attention,
    "cudnn": attention_cudnn.attention,
}
CHECKS = {
    "xla": lambda q, k, v, bias: None,
    "tpu": _check_tpu,
    "cudnn": attention_cudnn.check,
}
# By platform; one that is not named has "xla".
ORDER = {
    "tpu": ("tpu", "xla"),
    "cuda": ("cudnn", "xla"),
    "cpu": ("xla",),
}
