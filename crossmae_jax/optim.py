"""The optimiser of pre-training: AdamW, warm-up and half-cosine, decay on matrices.

For a fractional epoch e, peak rate r, w warm-up epochs of E in all (MAE, arXiv
2111.06377, appendix A.1; the reference evaluates it at the start of each step):

    lr(e) = r e / w                                                   e < w
    lr(e) = min_lr + (r - min_lr) (1 + cos(pi (e - w) / (E - w))) / 2   otherwise

Peak rate: base_lr * batch / 256, times gamma / p in CrossMAE (arXiv 2401.14391,
appendix A: the loss over fewer predicted patches has more variance).

AdamW is decoupled: the decay of a step is lr * weight_decay. Tensors of one dimension
(biases, norms) are exempt; class token, mask token and the inter-block weights have
more, and are decayed as in the reference.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

LR_SCALES = {
    "pred_over_mask": lambda masking: masking.pred_ratio / masking.mask_ratio,
    "mask_over_pred": lambda masking: masking.mask_ratio / masking.pred_ratio,
    "none": lambda masking: 1.0,
}


def peak_lr(config: ConfigDict) -> float:
    """Returns the learning rate after warm-up.

    Raises:
      ValueError: if `config.optim.lr_scale` is unknown.
    """
    kind = config.optim.lr_scale
    if kind not in LR_SCALES:
        raise ValueError(
            f"Unknown lr_scale {kind!r}. Known: {', '.join(sorted(LR_SCALES))}."
        )
    scale = LR_SCALES[kind](config.masking)
    return config.optim.base_lr * config.data.batch_size / 256 * scale


def warmup_cosine(
    epoch: Float[Array, "*n"],
    *,
    peak: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
) -> Float[Array, "*n"]:
    """Returns the learning rate at a fractional epoch.

    The cosine is taken as 2 sin^2 of the time left, which keeps its digits near the end
    where 1 + cos cancels.
    """
    left = jnp.clip((epochs - epoch) / (epochs - warmup_epochs), 0.0, 1.0)
    cosine = min_lr + (peak - min_lr) * jnp.sin(0.5 * jnp.pi * left) ** 2
    warmup = peak * epoch / max(warmup_epochs, 1e-9)
    return jnp.where(epoch < warmup_epochs, warmup, cosine)


def make_schedule(
    config: ConfigDict, *, steps_per_epoch: float
) -> Callable[[Array], Array]:
    """Returns the learning rate as a function of the number of updates made.

    Raises:
      ValueError: if warm-up is not shorter than training.
    """
    if config.optim.warmup_epochs >= config.epochs:
        raise ValueError(
            f"warmup_epochs={config.optim.warmup_epochs} must be below "
            f"epochs={config.epochs}; lower config.optim.warmup_epochs."
        )
    peak = peak_lr(config)

    def schedule(step):
        return warmup_cosine(
            jnp.asarray(step / steps_per_epoch, jnp.float32),
            peak=peak, min_lr=config.optim.min_lr,
            warmup_epochs=config.optim.warmup_epochs, epochs=config.epochs,
        )

    return schedule


def decay_mask(params: Any) -> Any:
    """Returns True for the tensors that decay: those of two dimensions or more."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def make_optimizer(
    config: ConfigDict, schedule: Callable[[Array], Array]
) -> optax.GradientTransformation:
    """Returns AdamW, after clipping by global norm if `optim.clip_norm` is set."""
    optim = config.optim
    adamw = optax.adamw(
        schedule, b1=optim.b1, b2=optim.b2, eps=1e-8,
        weight_decay=optim.weight_decay, mask=decay_mask,
    )
    if optim.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)
