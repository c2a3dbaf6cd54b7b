"""A patch projection for images of another number of channels."""

import einops
import numpy as np

ADAPTATIONS = ("mean", "repeat", "sum")


def adapted(
    kernel: np.ndarray, *, num_in: int, num_out: int, how: str
) -> np.ndarray:
    """Returns a patch projection `[(p p c), dim]` for another number of channels.

    Args:
      how: "mean" gives every new channel the mean of the old channels' filters;
        "sum" their sum divided by the new number, so that a grey image in all channels
        projects as before; "repeat" the old filters in turn, times `num_in / num_out`
        (timm's way).
    """
    old = einops.rearrange(kernel, "(pp c) d -> pp c d", c=num_in)
    if how == "repeat":
        new = old[:, np.arange(num_out) % num_in] * (num_in / num_out)
    else:
        total = old.mean(1) if how == "mean" else old.sum(1) / num_out
        new = einops.repeat(total, "pp d -> pp c d", c=num_out)
    return einops.rearrange(new, "pp c d -> (pp c) d").astype(kernel.dtype)
