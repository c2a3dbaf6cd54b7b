"""Settings with which a step that does not fit into memory may fit, and by how much."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from crossmae_jax.cost import estimate
from crossmae_jax.cost.estimate import Estimate


class Suggestion(NamedTuple):
    """Settings that may make a configuration fit; `tried` is None if not compiled."""

    settings: dict[str, Any]
    tried: Estimate | None


def _divisor(current: Estimate, copies: int) -> float | None:
    """Returns by what the images at work must be divided; None if nothing helps.

    A tenth more than the arrays that grow with them ask for. At least 2 where the
    compiler refused and named no sizes.

    Args:
      copies: of the weights, which the gradients take however few images there are.
    """
    if current.memory is None or current.capacity is None:
        return 2.0
    fixed = current.memory.state + copies * current.memory.weights
    room = current.capacity.sure - fixed
    if room <= 0:
        return None
    return 1.1 * max(0, current.memory.total - fixed) / room


def _shares(current: Estimate) -> Iterator[int]:
    """Yields over how many devices a copy of the state would have to be cut to fit."""
    for devices in range(current.fsdp + 1, current.num_devices + 1):
        if current.num_devices % devices:
            continue
        if current.memory is None or current.capacity is None:
            yield devices
            continue
        # With the gradients, which are cut as the weights are.
        cut = 2 * current.memory.weights + current.memory.moments
        saved = cut * (1 - current.fsdp / devices)
        if current.memory.total - saved <= current.capacity.sure:
            yield devices


def candidates(config: ConfigDict, current: Estimate) -> list[Iterator[dict[str, Any]]]:
    """Returns ways to make a configuration fit, each from its mildest form on.

    More micro-batches, recomputation and weights cut over more devices leave the result
    of a step as it is; a smaller batch is another training.
    """
    ways = []
    batch, now, devices = current.batch_size, current.accum_steps, current.num_devices
    if least := _divisor(current, copies=2):  # of one part, and the sum of all
        ways.append(
            {"optim.accum_steps": parts}
            for parts in range(max(now + 1, math.ceil(now * least)), batch + 1)
            if batch % (devices * parts) == 0
        )
    if smaller := _divisor(current, copies=1):
        if config.model.remat != "full":
            ways.append(iter([{"model.remat": "full"}]))
    if shares := list(_shares(current)):
        ways.append({"mesh.fsdp": devices} for devices in shares)
    if smaller:
        halved = (batch // 2**power for power in range(1, batch.bit_length()))
        ways.append(
            {"data.batch_size": size}
            for size in halved
            if size <= batch / smaller and size % (devices * now) == 0
        )
    return ways


def suggest(
    config: ConfigDict, current: Estimate, *, num_tests: int,
    alive: Callable[[], None] = lambda: None,
) -> list[Suggestion]:
    """Returns settings that may make a configuration fit that does not.

    Args:
      num_tests: how many compilations may be spent on finding out whether they do. One
        that does not is followed by the next stronger.
      alive: called before each of them.
    """
    suggestions = []
    for way in candidates(config, current):
        for settings in way:
            tried = None
            if num_tests > 0:
                num_tests -= 1
                alive()
                changed = estimate.with_settings(config, settings)
                tried = estimate.estimate(
                    changed, current.target, optimized=current.optimized
                )
            suggestions.append(Suggestion(settings, tried))
            if tried is None or tried.fits == "yes":
                break
    return suggestions
