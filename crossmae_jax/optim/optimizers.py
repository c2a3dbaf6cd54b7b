"""Optimisers: AdamW and LARS, warm-up and half-cosine or steps, decay on matrices.

For a fractional epoch e, peak rate r, w warm-up epochs of E in all (MAE, arXiv
2111.06377, appendix A.1; the reference evaluates it at the start of each step):

    lr(e) = warmup_lr + (r - warmup_lr) e / w                           e < w
    lr(e) = min_lr + (r - min_lr) (1 + cos(pi (e - w) / (E - w))) / 2   otherwise

and instead of the second line with `optim.schedule="step"` (SimMIM, arXiv 2111.09886,
at 800 epochs)

    lr(e) = r * drop_factor ^ (number of drop_epochs up to e)           otherwise

Peak rate: base_lr * batch / base_batch, times gamma / p in CrossMAE (arXiv 2401.14391,
appendix A: the loss over fewer predicted patches has more variance).

AdamW is decoupled: the decay of a step is lr * weight_decay. Tensors of one dimension
(biases, norms) are exempt; class token, mask token and the inter-block weights have
more, and are decayed as in the reference. Fine-tuning exempts tokens and positions, too
(`optim.decay_tokens=False`).

LARS, for linear probing (MAE, appendix A.1), in the order of MoCo v3 (arXiv 2104.02057,
`util/lars.py` of MAE). For weights w, gradient g and momentum m:

    u = g + weight_decay w;  b = m b + u * c |w| / |u|;  w = w - lr b

The trust coefficient c (`optim.trust_coefficient`) is 0.001 there. The rate stands
outside of the buffer, the decay inside of the norm (optax.lars has it the other way
round); the factor is 1 where a norm is 0. What does not decay has neither decay nor
factor.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from crossmae_jax import ranges
from crossmae_jax.models import encoders
from crossmae_jax.optim import layerwise

LR_SCALES = {
    "pred_over_mask": lambda config: (
        config.masking.pred_ratio / config.masking.mask_ratio
    ),
    "none": lambda config: 1.0,
}


def peak_lr(config: ConfigDict) -> float:
    """Returns the learning rate after warm-up.

    Raises:
      ValueError: if `config.optim.lr_scale` is unknown.
    """
    kind = config.optim.lr_scale
    if kind not in LR_SCALES:
        raise ValueError(
            f"Unknown lr_scale {kind!r}. Known: {', '.join(sorted(LR_SCALES))}; any "
            "other factor goes into base_lr, with lr_scale='none'."
        )
    ranges.check("optim.base_batch", config.optim.base_batch, least=1)
    scale = LR_SCALES[kind](config)
    batches = config.data.batch_size / config.optim.base_batch
    return config.optim.base_lr * batches * scale


def warmup_cosine(
    epoch: Float[Array, "*n"],
    *,
    peak: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
    warmup_lr: float = 0.0,
) -> Float[Array, "*n"]:
    """Returns the learning rate at a fractional epoch.

    The cosine is taken as 2 sin^2 of the time left, which keeps its digits near the end
    where 1 + cos cancels.
    """
    left = jnp.clip((epochs - epoch) / (epochs - warmup_epochs), 0.0, 1.0)
    cosine = min_lr + (peak - min_lr) * jnp.sin(0.5 * jnp.pi * left) ** 2
    warmup = _warmup(epoch, peak, warmup_lr, warmup_epochs)
    return jnp.where(epoch < warmup_epochs, warmup, cosine)


def warmup_steps(
    epoch: Float[Array, "*n"],
    *,
    peak: float,
    warmup_lr: float,
    warmup_epochs: float,
    drop_epochs: tuple[float, ...],
    drop_factor: float,
) -> Float[Array, "*n"]:
    """Returns the learning rate at a fractional epoch: constant but for its drops."""
    drops = sum((epoch >= drop).astype(jnp.float32) for drop in drop_epochs)
    warmup = _warmup(epoch, peak, warmup_lr, warmup_epochs)
    return jnp.where(epoch < warmup_epochs, warmup, peak * drop_factor**drops)


def _warmup(epoch, peak, warmup_lr, warmup_epochs):
    return warmup_lr + (peak - warmup_lr) * epoch / max(warmup_epochs, 1e-9)


SCHEDULES = {
    "cosine": lambda config: functools.partial(
        warmup_cosine, min_lr=config.optim.min_lr, epochs=config.epochs
    ),
    "step": lambda config: functools.partial(
        warmup_steps, drop_epochs=tuple(config.optim.drop_epochs),
        drop_factor=config.optim.drop_factor,
    ),
}


def make_schedule(
    config: ConfigDict, *, steps_per_epoch: float
) -> Callable[[Array], Array]:
    """Returns the learning rate as a function of the number of updates made.

    Raises:
      ValueError: if warm-up is not shorter than training, a rate is below 0, or rates
        are to drop at epochs that there are not.
    """
    optim = config.optim
    for name in ("base_lr", "min_lr", "warmup_lr", "warmup_epochs", "drop_factor"):
        ranges.check(f"optim.{name}", optim[name], least=0)
    if optim.warmup_epochs >= config.epochs:
        raise ValueError(
            f"warmup_epochs={optim.warmup_epochs} must be below "
            f"epochs={config.epochs}; lower config.optim.warmup_epochs."
        )
    if optim.schedule not in SCHEDULES:
        raise ValueError(
            f"Unknown optim.schedule {optim.schedule!r}. Known: "
            f"{', '.join(sorted(SCHEDULES))}."
        )
    drops = tuple(optim.drop_epochs)
    unused = "min_lr" if optim.schedule == "step" else "drop_factor"
    usual = {"min_lr": 0.0, "drop_factor": 0.1}[unused]
    if optim[unused] != usual:
        raise ValueError(
            f"optim.{unused}={optim[unused]} does nothing with optim.schedule="
            f"{optim.schedule!r}; leave it at {usual}."
        )
    if (optim.schedule == "step") != bool(drops) or any(
        not optim.warmup_epochs < drop < config.epochs for drop in drops
    ):
        raise ValueError(
            f"optim.drop_epochs={drops} with optim.schedule={optim.schedule!r}: the "
            "schedule 'step', and no other, needs epochs at which the rate drops, "
            f"behind warmup_epochs={optim.warmup_epochs} and before "
            f"epochs={config.epochs}, such as drop_epochs=(700.0,) of 800."
        )
    rate = SCHEDULES[optim.schedule](config)
    peak = peak_lr(config)

    def schedule(step):
        return rate(
            jnp.asarray(step / steps_per_epoch, jnp.float32), peak=peak,
            warmup_lr=optim.warmup_lr, warmup_epochs=optim.warmup_epochs,
        )

    return schedule


_TOKEN = re.compile(r"(_token|pos_embed|relative_position_bias_table)$")


def decay_mask(params: Any, *, tokens: bool = True) -> Any:
    """Returns True for the tensors that decay: those of two dimensions or more.

    Args:
      tokens: whether class token, mask token, trained positions and Swin's position
        biases are among them.
    """
    return jax.tree.map(
        lambda x, name: x.ndim > 1 and (tokens or not _TOKEN.search(name)),
        params, layerwise.names(params),
    )


def _adamw(optim, schedule, decays):
    ranges.check("optim.b2", optim.b2, least=0, below=1)
    return optax.adamw(
        schedule, b1=optim.b1, b2=optim.b2, eps=1e-8,
        weight_decay=optim.weight_decay, mask=decays,
    )


def _lars(optim, schedule, decays):
    ranges.check("optim.trust_coefficient", optim.trust_coefficient, above=0)
    return optax.chain(
        optax.add_decayed_weights(optim.weight_decay, mask=decays),
        optax.masked(
            optax.scale_by_trust_ratio(trust_coefficient=optim.trust_coefficient),
            decays,
        ),
        optax.trace(decay=optim.b1),
        optax.scale_by_learning_rate(schedule),
    )


OPTIMIZERS = {"adamw": _adamw, "lars": _lars}


def make_optimizer(
    config: ConfigDict, schedule: Callable[[Array], Array]
) -> optax.GradientTransformation:
    """Returns the optimiser that `config.optim` describes.

    From the inside out: AdamW or LARS; before it, clipping by global norm; frozen
    parameters; rates by layer. What is not set leaves no trace in the state.

    Raises:
      ValueError: for an unknown optimiser, options outside of their ranges, or a
        number of blocks or decay of rates that the encoder of `config.model` cannot
        have.
    """
    optim = config.optim
    if optim.name not in OPTIMIZERS:
        raise ValueError(
            f"Unknown optim.name {optim.name!r}. Known: {', '.join(OPTIMIZERS)}."
        )
    ranges.check("optim.weight_decay", optim.weight_decay, least=0)
    ranges.check("optim.b1", optim.b1, least=0, below=1)
    decays = functools.partial(decay_mask, tokens=optim.decay_tokens)
    tx = OPTIMIZERS[optim.name](optim, schedule, decays)
    if optim.clip_norm is not None:
        ranges.check("optim.clip_norm", optim.clip_norm, above=0)
        tx = optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx)
    tune_blocks = config.get("tune_blocks")
    if tune_blocks is None and optim.layer_decay == 1:
        return tx
    depth = encoders.build_encoder(config).depth
    if tune_blocks is not None:
        tx = layerwise.freeze(tx, tune_blocks=tune_blocks, depth=depth)
    if optim.layer_decay != 1:
        scale = layerwise.scale_by_layer(decay=optim.layer_decay, depth=depth)
        tx = optax.chain(tx, scale)
    return tx
