"""Reads and writes PyTorch checkpoints (`.pth`) without PyTorch, and runs no code.

A `.pth` file is a pickle that describes objects, and the raw bytes of every storage:
since PyTorch 1.6 as uncompressed entries of a zip archive, before that one after
another behind the pickle, which `torch_pickle` interprets.

Tensors are described and not read, so that a file larger than memory can be taken
apart; for the same reason the checksums of a zip archive are not verified.
"""

import mmap
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from crossmae_jax.convert.files.tensor import Tensor, Tensors
from crossmae_jax.convert.files.torch_pickle import (
    SAVE_AGAIN,
    STORAGES,
    Unfit,
    row_major,
    unpickle,
)

_ZIP = b"PK\x03\x04"
_LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_ALIGNMENT = 64  # bytes, as in torch.save: mmap=True uses storages where they lie
_HEADER = struct.Struct("<4s22xHH")  # of a zip entry; its name and extra field follow


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [n[:-len("data.pkl")] for n in names if n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Unfit(
                "is a zip archive but not a PyTorch checkpoint: expected one data.pkl "
                f"inside, found {len(roots)}."
            )

        def place(name: str) -> tuple[int, int]:
            info = archive.getinfo(roots[0] + name)
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise Unfit(f"has {name} compressed or encrypted. {SAVE_AGAIN}")
            header = max(info.header_offset, 0)
            signature, *more = _HEADER.unpack_from(data, header)
            start = header + _HEADER.size + sum(more)
            if signature != _ZIP or start + info.file_size > len(data):
                raise ValueError(f"{name} is not where the archive says")
            return start, start + info.file_size

        if roots[0] + "byteorder" in names:
            if data[slice(*place("byteorder"))] != b"little":
                raise Unfit("was written on a big-endian machine; save it on another.")
        data.seek(place("data.pkl")[0])
        return unpickle(data, path, lambda key, _itemsize: place(f"data/{key}"))


def _read_legacy(path: Path, data: mmap.mmap) -> Any:
    itemsizes: dict[str, int] = {}
    places: dict[str, tuple[int, int]] = {}

    def expect(key: str, itemsize: int) -> tuple[int, int]:
        itemsizes.setdefault(key, itemsize)
        return 0, 2**63

    _magic, protocol, system = (unpickle(data, path, expect) for _ in range(3))
    if protocol != 1001 or system["little_endian"] is not True:
        raise Unfit("is of another protocol than 1001, or of a big-endian machine.")
    begin = data.tell()
    unpickle(data, path, expect)  # for the keys: where storages lie comes after them
    keys = unpickle(data, path, expect)
    position = data.tell()
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("a storage has no name")
        count = int.from_bytes(data[position:position + 8], "little")
        places[key] = position + 8, position + 8 + count * itemsizes[key]
        position = places[key][1]
        if position > len(data):
            raise ValueError(f"storage {key} ends after the file")
    data.seek(begin)
    return unpickle(data, path, lambda key, _itemsize: places[key])


def read(path: str | Path) -> Any:
    """Returns what a `.pth` file holds: lazy tensors, and namespaces as dictionaries.

    Raises:
      ValueError: if the file is damaged, or names anything but tensors, containers
        and the arguments of a run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint {path}.")
    try:
        with path.open("rb") as file, mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_READ
        ) as data:
            if data[:4] == _ZIP:
                return _read_zip(path, data)
            if _LEGACY in data[:32]:
                return _read_legacy(path, data)
            if data[257:262] == b"ustar":
                raise Unfit(f"is a tar archive of the first PyTorch. {SAVE_AGAIN}")
            raise Unfit(
                "does not begin as a file of torch.save; is it cut short, a page or a "
                "pointer of Git LFS that was downloaded in its place, or compressed?"
            )
    except Unfit as error:
        raise ValueError(f"{path} {error}") from error
    except (  # in which the interpretation of a pickle without sense can end
        AttributeError, LookupError, NotImplementedError, TypeError, ValueError,
        struct.error, zipfile.BadZipFile,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged ({reason}). Copy it again.") from error


def _plain(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]  # without its first and last opcode


def _described(value: Tensor, number: int) -> bytes:
    storages = [name for name, dtype in STORAGES.items() if dtype == value.dtype]
    if not storages:
        known = ", ".join(dtype.name for dtype in STORAGES.values())
        raise ValueError(f"PyTorch has no storage for {value.dtype}. Known: {known}.")
    return b"".join((
        b"ctorch._utils\n_rebuild_tensor_v2\n((", _plain("storage"),
        f"c{storages[0].replace('.', chr(10))}\n".encode(), _plain(str(number)),
        _plain("cpu"), _plain(value.size), b"tQ", _plain(0), _plain(value.shape),
        _plain(row_major(value.shape)), _plain(False),
        b"ccollections\nOrderedDict\n)RtR",
    ))


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: Any) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    large = len(content) > zipfile.ZIP64_LIMIT
    begin = file.tell() + _HEADER.size + len(info.filename) + 4 + (20 if large else 0)
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack(f"<2sH{padding}x", b"FB", padding)  # as torch.save
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(content)


def write(path: str | Path, content: dict[str, str | Tensors]) -> None:
    """Writes strings and tensors by name as `torch.load` reads them (PyTorch >= 1.6).

    One tensor at a time is in memory; `weights_only=True` and `mmap=True` work.
    """
    tensors: list[Tensor] = []
    description = [b"\x80\x02}("]
    for key, value in content.items():
        description.append(_plain(key))
        if isinstance(value, str):
            description.append(_plain(value))
            continue
        description.append(b"ccollections\nOrderedDict\n)R(")
        for name, described in value.items():
            description += _plain(name), _described(described, len(tensors))
            tensors.append(described)
        description.append(b"u")
    with open(path, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            _add(archive, file, "data.pkl", b"".join((*description, b"u.")))
            _add(archive, file, "byteorder", b"little")
            for number, value in enumerate(tensors):
                _add(archive, file, f"data/{number}", value.raw())
            _add(archive, file, "version", b"3\n")
        file.flush()
        os.fsync(file.fileno())
