"""Finds the tensors of one ViT in a file, out of what they are wrapped in.

Training scripts put tensors into dictionaries (`model`, `state_dict_ema`, `teacher`),
and before their names what the model was wrapped in (`module._orig_mod.`,
`backbone.`). Where a patch projection is, there is a ViT, in SimMIM's files with its
decoder: a place is the keys of the dictionaries and what its names begin with, joined
by dots. If a file has one place, it
is taken; if it has several, or other tensors beside it, the user says which: `under`.
"""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crossmae_jax.convert import hints, names
from crossmae_jax.convert.files import safetensors_file, torch_file
from crossmae_jax.convert.files.tensor import Tensor, Tensors
from crossmae_jax.convert.names import ConversionError, Untold

WEIGHTS = "model.safetensors"  # in folders
_LEVELS = 3  # of dictionaries in each other
_PROJECTIONS = (  # of timm and MAE, and of transformers with and without its prefix
    "patch_embed.proj.weight",
    "vit.embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.weight",
)


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
      tensors: under the names that their format gives them.
      rest: what lies beside them; "under" names the dictionary that they lay in.
      place: the keys and the beginnings that were taken off, with dots; "." for none.
      evidence: what is to be said about that, a line each; likewise `changed`, where
        nobody had asked for it.
    """

    tensors: Tensors
    rest: dict[str, Any]
    place: str = "."
    evidence: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


class _Place(NamedTuple):
    keys: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def title(self) -> str:
        return ".".join((*self.keys, *self.prefix.split("."))).strip(".") or "."


def read(path: Path, *, under: str | None = None) -> Contents:
    """Returns the tensors of a file or a folder, and what else it holds.

    Args:
      under: the place of the tensors, where a file has several.

    Raises:
      ConversionError: if they cannot be read, or it is not clear which are meant.
    """
    content = _folder(path) if path.is_dir() else _file(path)
    places = list(_places(content, ()))
    if not places:
        return _without_place(path, content)
    if under is not None:
        wanted = under.strip(".") or "."
        chosen = [place for place in places if place.title == wanted]
        if not chosen:
            raise ConversionError(
                f"{path} has no patch projection under={under!r}; there are:"
                + _listing(places)
            )
        return _taken(content, chosen[0], asked=True)
    if len(places) > 1:
        raise Untold(
            f"{path} holds the weights of {len(places)} ViTs; say which, with "
            f"under={places[0].title!r}, or --under={places[0].title}:"
            + _listing(places), flags=f"--under={places[0].title}",
        )
    (place,) = places
    if place.prefix and place.others:
        raise Untold(
            f"{path} holds a ViT and other tensors beside it. To take the ViT alone: "
            f"under={place.title!r}, or --under={place.title}."
            + names.listing("the ViT", [_counted(place.title, len(place.tensors))])
            + names.listing("beside it", _beginnings(place.others)),
            flags=f"--under={place.title}",
        )
    return _taken(content, place, asked=False)


def _file(path: Path) -> dict[Any, Any]:
    """Returns what a file holds; of safetensors the metadata beside the tensors."""
    try:
        if path.suffix == ".safetensors":
            tensors, metadata = safetensors_file.read(path)
            return {**metadata, **tensors}
        content = torch_file.read(path)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if not isinstance(content, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors."
        )
    return content


def _folder(path: Path) -> dict[Any, Any]:
    index = path / f"{WEIGHTS}.index.json"
    if index.is_file():
        shards = hints.read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ConversionError(f"{index} has no weight_map.")
        merged: dict[Any, Any] = {}
        for name in sorted(set(map(str, shards.values()))):
            # Shards are siblings, and links in a hub's cache. What else an index of
            # a stranger may name is none of its business.
            if "/" in name or "\\" in name or not (path / name).is_file():
                raise ConversionError(
                    f"{index} names {name!r}; expected a file beside it. Copy the "
                    "folder again, all of its files."
                )
            merged |= _tensors(_file(path / name))
        return merged
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (path / name).is_file():
            return _file(path / name)
    raise ConversionError(f"{path} has neither {WEIGHTS} nor pytorch_model.bin.")


def _tensors(level: dict[Any, Any]) -> dict[str, Tensor]:
    return {
        name: value for name, value in level.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _places(level: dict[Any, Any], keys: tuple[str, ...]) -> Iterator[_Place]:
    """Yields where ViTs are, in a dictionary and in those that lie in it."""
    tensors = _tensors(level)
    prefixes = []
    for name in tensors:
        for projection in _PROJECTIONS:
            prefix = name.removesuffix(projection)
            if prefix != name and (not prefix or prefix.endswith(".")):
                prefixes.append(_of_whole_model(prefix, tensors))
                break
    for prefix in prefixes:
        # What is under a longer one is not of this one.
        longer = tuple(p for p in prefixes if len(p) > len(prefix))
        own = {
            name: value for name, value in tensors.items()
            if name.startswith(prefix) and not name.startswith(longer)
        }
        others = {name: value for name, value in tensors.items() if name not in own}
        own = {name.removeprefix(prefix): value for name, value in own.items()}
        yield _Place(keys, prefix, own, others)
    if len(keys) < _LEVELS:
        for key, value in level.items():
            if isinstance(key, str) and isinstance(value, dict):
                yield from _places(value, (*keys, key))


def _of_whole_model(prefix: str, tensors: dict[str, Tensor]) -> str:
    """Returns what names begin with; of SimMIM's without the "encoder." in them.

    In its files a layer lies beside the encoder, and both are one model.
    """
    outer = prefix.removesuffix("encoder.")
    whole = outer in ("", prefix) or outer.endswith(".")
    return outer if whole and f"{outer}decoder.0.weight" in tensors else prefix


def _taken(content: dict[Any, Any], place: _Place, *, asked: bool) -> Contents:
    level, rest = content, {}
    for key in place.keys:
        rest |= {name: value for name, value in level.items() if name != key}
        level = level[key]
    rest |= {
        name: value for name, value in level.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    }
    if place.keys:
        rest["under"] = ".".join(place.keys)
    evidence, changed = [], []
    if asked:
        evidence.append(f"{len(place.tensors)} tensors under {place.title}, as asked")
        if place.others:
            left = ", ".join(_beginnings(place.others))
            evidence.append(f"left out, beside them: {left}")
    elif place.prefix:
        changed.append(f"taken off: {place.prefix}, with which all names began")
    return Contents(
        place.tensors, rest, place.title, tuple(evidence), tuple(changed)
    )


def _without_place(path: Path, content: dict[Any, Any]) -> Contents:
    """Returns tensors that are no ViT's of another library, to be looked at."""
    for key in ("model", "state_dict"):
        inner = content.get(key)
        if isinstance(inner, dict) and _tensors(inner):
            rest = {name: value for name, value in content.items() if name != key}
            return Contents(_tensors(inner), {**rest, "under": key})
    tensors = _tensors(content)
    if not tensors:
        raise ConversionError(
            f"{path} has no dictionary of tensors, neither by itself nor under 'model' "
            f"or 'state_dict'; it holds {', '.join(map(str, list(content)[:8]))}."
        )
    return Contents(tensors, {k: v for k, v in content.items() if k not in tensors})


def _counted(title: str, number: int) -> str:
    return f"{title} ({number} tensors)"


def _listing(places: list[_Place]) -> str:
    return names.listing(
        "places", [_counted(place.title, len(place.tensors)) for place in places]
    )


def _beginnings(tensors: dict[str, Tensor]) -> list[str]:
    """Returns what names begin with: as much as tells them apart, with how many."""
    short = collections.Counter(name.partition(".")[0] for name in tensors)
    if len(short) == 1:  # of all, so that the next word tells more
        short = collections.Counter(
            ".".join(name.split(".")[:2]) for name in tensors
        )
    return [_counted(title, number) for title, number in short.items()]
