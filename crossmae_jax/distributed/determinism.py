"""What XLA needs on a GPU so that a program that runs twice computes the same bits.

Two things differ between runs there: operations whose sums are made in whatever order
threads arrive (scatter, products, convolutions, fused attention backwards), and which
kernel is the fastest, measured anew by each compilation. One flag excludes the former
and switches the latter off. XLA says that what it takes instead may be slower; it
refuses to compile what has no deterministic form.
https://openxla.org/xla/determinism, and xla_gpu_deterministic_ops in xla.proto

On CPU and TPU the flag changes nothing. This module does not import JAX, which reads
the flags once, as it starts.
"""

import os
import sys
from collections.abc import MutableMapping

from crossmae_jax import errors

FLAG = "--xla_gpu_deterministic_ops"


def require(environment: MutableMapping[str, str] = os.environ) -> str:
    """Has XLA compute the same bits each time on a GPU; returns a line about it.

    To be called before JAX starts. What XLA_FLAGS holds already stays.

    Raises:
      SetupError: if XLA_FLAGS asks for the opposite, or JAX has started already.
    """
    if "jax" in sys.modules:
        raise errors.SetupError(
            "--deterministic comes too late: JAX is imported. Set "
            f"XLA_FLAGS={FLAG}=true before that."
        )
    given = environment.get("XLA_FLAGS", "").split()
    values = [
        value for name, _, value in (flag.partition("=") for flag in given)
        if name == FLAG
    ]
    if any(value.lower() not in ("", "true", "1") for value in values):
        raise errors.SetupError(
            f"XLA_FLAGS has {FLAG}={values[-1]}, but --deterministic asks for the "
            "opposite; leave out one of the two."
        )
    if not values:
        environment["XLA_FLAGS"] = " ".join([*given, f"{FLAG}=true"])
    return (
        f"deterministic: XLA_FLAGS has {FLAG}=true: no tuning of kernels, and slower "
        "ones where the fast are not repeatable (a GPU pays for it, how much was not "
        "measured; CPU and TPU do not)"
    )
