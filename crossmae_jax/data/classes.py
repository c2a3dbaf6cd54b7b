"""Classes are known by name: a number is a place in one data set's list of names.

Two data sets of the same images may number their classes in two ways: folders are
numbered in the order of their names, TFDS has lists of its own. So names go with a run
and its weights, and what another data set calls class 3 is looked up by its name.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from crossmae_jax import errors

_SHOWN = 5


def numbers(
    own: Sequence[str], names: Sequence[str], *, what: str
) -> Int[np.ndarray, "own"]:
    """Returns the number in `names` of each of a data set's own classes.

    Args:
      own: names of its classes, in its own order; it need not have all of `names`.
      what: what errors call the data set.

    Raises:
      SetupError: if it has classes that are none of `names`; lists what differs.
    """
    number = {name: i for i, name in enumerate(names)}
    if others := [name for name in own if name not in number]:
        there = set(own)
        raise errors.SetupError(
            f"{what} has {len(own)} classes, of which {listed(others)} "
            f"{'is' if len(others) == 1 else 'are'} none of the {len(names)} that "
            f"labels stand for here; of those it lacks "
            f"{listed([name for name in names if name not in there])}. Classes are "
            "matched by name: rename its folders, or give the data set that the "
            "classes come from."
        )
    return np.array([number[name] for name in own], np.int32)


def listed(names: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
