"""Imports what conversions are checked with: torch, timm, transformers.

timm and transformers import torchvision, of which they need the transforms of images
only. The torchvision of the package registry is built for CUDA; beside a PyTorch for
CPUs its compiled operators do not load, and its import ends at the first that its
Python code looks up ("operator torchvision::nms does not exist"). A declaration without
an implementation is enough for what is done here.
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

_DETECTION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# What packages raise when a binary part of them, or of what they import, does not load.
_IMPORT_ERRORS = (AttributeError, ImportError, OSError, RuntimeError)


def obstacle(package: str, modules: tuple[str, ...]) -> str | None:
    """Imports torch and modules of a package; returns why that fails, if it does."""
    for module in ("torch", *modules):
        try:
            importlib.import_module(module)
            declare_operators()
        except _IMPORT_ERRORS as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                return (
                    f"{module} is not installed; pip install "
                    "'crossmae-jax[interop]' brings what compares both sides"
                )
            return f"{package} does not import ({type(error).__name__}: {error})"
    return None


@functools.cache
def declare_operators() -> Any:
    """Declares what torchvision looks up, unless its own operators load.

    Loading them is tried without torchvision, no half of which is left behind then.

    Returns:
      What keeps the declarations alive; None if none were needed.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(compiled)
            return None
        except OSError:
            pass
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _DETECTION)
    return library
