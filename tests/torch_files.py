"""PyTorch files for tests: saved by torch, or put together by hand."""

import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from crossmae_jax.convert.files import tensor

GOLDEN = Path(__file__).parent / "golden"
FORMS = ("zip", "legacy")
DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
}


def save(content, path, form):
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def bits(value):
    """Values of PyTorch as NumPy's, bfloat16 included."""
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def assert_same(ours, theirs):
    assert isinstance(ours, tensor.Tensor)
    values, expected = ours.read(), bits(theirs)
    assert ours.shape == values.shape == expected.shape
    assert ours.dtype == values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected)


# Pickles by hand. `plain` leaves out the first and last opcode.


def plain(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def named(module, name):
    return f"c{module}\n{name}\n".encode()


def call(module, name, *arguments):
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def stored(key="0", count=4, kind="FloatStorage", view=None):
    return (
        b"(" + plain("storage") + named("torch", kind) + plain(key) + plain("cpu")
        + plain(count) + (b"" if view is None else plain(view)) + b"tQ"
    )


def built(storage, offset, size, stride, *more):
    return call(
        "torch._utils", "_rebuild_tensor_v2", storage, plain(offset), plain(size),
        plain(stride), plain(False), call("collections", "OrderedDict"),
        *map(plain, more),
    )


def make(path, form, body, *, storages=None, entry=None):
    """Writes a checkpoint around the body of a pickle."""
    storages = {"0": np.arange(4, dtype=np.float32)} if storages is None else storages
    body = b"\x80\x02" + body + b"."
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", body)
            for key, values in storages.items():
                archive.writestr(f"archive/data/{key}", values.tobytes())
        return path
    system = {"little_endian": True, "protocol_version": 1001}
    parts = [pickle.dumps(part, protocol=2) for part in
             (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [body, pickle.dumps(sorted(storages), protocol=2)]
    for key in sorted(storages):
        parts.append(struct.pack("<q", storages[key].size) + storages[key].tobytes())
    path.write_bytes(b"".join(parts))
    return path
