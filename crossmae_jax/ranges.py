"""Which numbers a setting may be: checked where it is used, said in one way.

    config.optim.base_lr=-1.0 must be 0 or more.

No comparison tells that a number is none, so a configuration is also looked through for
what is not finite, before anything is made of it.
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

Number = int | float


def check(
    name: str, value: Number, *,
    least: Number | None = None, above: Number | None = None,
    most: Number | None = None, below: Number | None = None,
) -> None:
    """Refuses a setting that is not finite, or outside of what it may be.

    Args:
      name: of the setting, without "config."; in the error.
      least: the smallest number that it may be, and `most` the largest; it must be
        greater than `above` and less than `below`.

    Raises:
      ValueError: names the setting, its value and what it may be.
    """
    limits = [
        (least, least is None or value >= least, "{} or more"),
        (above, above is None or value > above, "above {}"),
        (most, most is None or value <= most, "at most {}"),
        (below, below is None or value < below, "below {}"),
    ]
    if -math.inf < value < math.inf and all(kept for _, kept, _ in limits):
        return
    words = [text.format(limit) for limit, _, text in limits if limit is not None]
    raise ValueError(
        f"config.{name}={value} must be {' and '.join(words) or 'a finite number'}."
    )


def check_finite(settings: Any, name: str = "config") -> None:
    """Refuses a configuration in which a number is infinite or none.

    Raises:
      ValueError: names the setting.
    """
    if isinstance(settings, (ConfigDict, Mapping)):
        for key, inner in settings.items():
            check_finite(inner, f"{name}.{key}")
    elif isinstance(settings, (list, tuple)):
        for inner in settings:
            check_finite(inner, name)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise ValueError(f"{name}={settings} must be a finite number.")
