"""Tensors of a file as torch's or safetensors' own loaders read them."""

import argparse
import zipfile
from pathlib import Path
from typing import Any

from crossmae_jax.convert import contents


def read(path: Path, place: str | None) -> dict[str, Any]:
    """Returns the tensors of a file, in float32.

    Args:
      place: of the tensors in it, as in `contents.Contents`, if it has several.
    """
    import safetensors.torch
    import torch

    if path.suffix == ".safetensors":
        content: Any = safetensors.torch.load_file(path)
    else:
        mmap = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    flat, held = _flat(content), contents.read(path, under=place)
    beginning = f"{held.place}.".lstrip(".")
    return {name: flat[beginning + name].float() for name in held.tensors}


def with_layer_scale(state: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors with layer scale called as timm, and not DeiT's authors, do."""
    for number in "12":
        state = {
            name.replace(f".gamma_{number}", f".ls{number}.gamma"): value
            for name, value in state.items()
        }
    return state


def _flat(content: dict[Any, Any]) -> dict[str, Any]:
    """Returns the tensors of dictionaries in each other, by their keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        elif hasattr(value, "float"):
            flat[str(key)] = value
    return flat
