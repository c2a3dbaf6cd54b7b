"""Which classes the files of a TFDS data set may name: TFDS's own features.

A prepared set says what its records hold in `features.json` (or `dataset_info.json`),
by names of Python classes, and TFDS imports whatever module such a name has. That runs
code of the one who made the files; so the names are looked at before.
"""

import contextlib
import threading
from collections.abc import Iterator

import tensorflow_datasets as tfds

from crossmae_jax import errors

_OWN = "tensorflow_datasets.core.features."
_REPLACING = threading.Lock()  # threads of the loader open sets at the same time


@contextlib.contextmanager
def only_own(name: str) -> Iterator[None]:
    """Has TFDS refuse other features than its own in the sets that are opened inside.

    Args:
      name: what errors call the set.

    Raises:
      SetupError: inside, if a set names another class.
    """
    connector = tfds.features.FeatureConnector
    with _REPLACING:
        original = connector.__dict__["cls_from_name"]

        def checked(cls: type, class_name: str) -> type:
            if not class_name.startswith(_OWN):
                raise errors.SetupError(
                    f"The files of TFDS data set {name!r} name the feature "
                    f"{class_name!r}, for which code would be imported and run. Read "
                    f"are TFDS's own, {_OWN}*. Prepare the set with those, or give "
                    "another one."
                )
            return original.__func__(cls, class_name)

        connector.cls_from_name = classmethod(checked)
        try:
            yield
        finally:
            connector.cls_from_name = original
