"""PyTorch checkpoints that would do harm, are damaged, or are of another kind."""

import argparse
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from crossmae_jax.convert.files import tensor, torch_file
from tests.torch_files import (
    FORMS,
    GOLDEN,
    built,
    call,
    make,
    named,
    plain,
    save,
    stored,
)

# Files that would do harm.


class _Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", FORMS)
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, form):
    target = tmp_path / "made_by_the_checkpoint"
    payload = pickle.dumps({"model": _Malice(target)}, protocol=2)
    pickle.loads(payload)
    assert target.exists(), "the payload does harm where it is trusted"
    target.rmdir()
    path = make(tmp_path / "evil.pth", form, payload[2:-1])
    with pytest.raises(ValueError, match=r"it names posix\.mkdir, .* was executed"):
        torch_file.read(path)
    assert not target.exists()


def test_code_in_any_pickle_of_a_legacy_file_is_not_run(tmp_path):
    target = tmp_path / "made_by_the_checkpoint"
    whole = make(tmp_path / "good.pth", "legacy", b"}").read_bytes()
    evil = pickle.dumps(_Malice(target), protocol=2)
    stream = io.BytesIO(whole)
    begins = []
    for _ in range(5):
        begins.append(stream.tell())
        pickle.load(stream)
    begins.append(stream.tell())
    path = tmp_path / "evil.pth"
    for begin, end in zip(begins[1:], begins[2:]):
        path.write_bytes(whole[:begin] + evil + whole[end:])
        with pytest.raises(ValueError, match=r"it names posix\.mkdir"):
            torch_file.read(path)
    assert not target.exists()


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("__builtin__", "eval"), ("builtins", "getattr"),
    ("torch.load", ""), ("torch._utils", "_rebuild_tensor_v3"), ("numpy", "ndarray"),
    ("torch.serialization", "load"), ("collections", "defaultdict"), ("torch", "load"),
])
def test_names_that_weights_do_not_need_are_refused(tmp_path, module, name):
    path = make(tmp_path / "x.pth", "zip", named(module, name))
    with pytest.raises(ValueError, match="was refused: it names ") as error:
        torch_file.read(path)
    assert f"{module}.{name}," in str(error.value)


_TENSOR = built(stored(), 0, (4,), (1,))
_DTYPE = call("numpy", "dtype", plain("f8"), plain(False), plain(True))


# Python's hash of a tuple of this depth overflows the stack and ends the process.
_NESTED = b")" + b"\x85" * 200_000


_HOSTILE = [
    # Instructions on objects that no checkpoint gives them for.
    (_TENSOR + b"}" + plain("shape") + plain((2**60,)) + b"sb", "sets attributes"),
    (named("torch", "Size") + b"}b", "sets attributes of type str"),
    (plain(5) + b")R", "it calls .* of type int"),
    (plain("posix.system") + b"(" + plain("ls") + b"tR", "it calls .* of type str"),
    (_NESTED + b")R", "it calls .* of type tuple"),
    (_TENSOR + plain(1) + b"a", "is damaged"),
    (b"]K\x05aK\x00K\x01s", "sets an item of a list"),
    (b"I1\n", "the instruction INT"),
    (b"\x93", "the instruction STACK_GLOBAL"),
    (b"\x82\x01", "the instruction EXT1"),
    (b"P0\n", "the instruction PERSID"),
    (b"}" + _NESTED + b"Ns", "key of type tuple"),
    (b"}(" + _NESTED + b"Nu", "key of type tuple"),
    (call("argparse", "Namespace") + b"]" + _NESTED + b"N\x86ab", "is damaged"),
    (call("__builtin__", "set", b"]" + _NESTED + b"a"), "key of type tuple"),
    (call("collections", "OrderedDict", b"]" + _NESTED + b"N\x86a"), "type tuple"),
    (call("argparse", "Namespace") + b"}" + _NESTED + b"Nsb", "key of type tuple"),
    # Names of storages and calls are looked up in tables.
    (b"(" + plain("storage") + _NESTED + plain("0") + b"NK\x04tQ", "is no storage"),
    (b"(" + plain("storage") + named("torch", "FloatStorage") + _NESTED
     + b"NK\x04tQ", "is no storage"),
    (stored("no such"), "is damaged"),
    (b"(" + plain("module") + plain("a") + plain("b") + plain("c") + b"NtQ",
     "is no storage"),
    (b"(" + plain("storage") + plain("torch.Storage") + plain("0") + b"NK\x01tQ",
     "KeyError: 'torch.Storage'"),
    (plain(3) + b"Q", "is damaged"),
    # NumPy's types can hold objects, which are addresses in memory.
    (call("numpy", "dtype", plain("O8"), plain(False), plain(True)), "type O8"),
    (call("numpy", "dtype", plain("V9"), plain(False), plain(True)), "type V9"),
    (call("numpy.core.multiarray", "scalar", _DTYPE,
           call("_codecs", "encode", plain("abc"), plain("latin1"))), "wrong size"),
    (call("numpy.core.multiarray", "scalar", _TENSOR, plain("8 bytes.")), "wrong"),
    (_DTYPE + plain((3, ">", None, None, None, -1, -1, 0)) + b"b", "big-endian"),
    # Text that grows with every level: 2**50 characters.
    (call("torch", "device", plain("a") + b"".join(
        b"q\x00(h\x00h\x00t" for _ in range(50))), "is damaged"),
    (call("torch", "device", plain("cuda"), b"]" + b"".join(
        b"q\x00(h\x00h\x00t" for _ in range(50))), "is damaged"),
    (call("_codecs", "encode", plain(3), plain("latin1")), "is damaged"),
    (call("pathlib", "PosixPath", plain(3)), "is damaged"),
    # Storages and tensors that are not what the file holds.
    (stored(count=5), "too short for 5 values"),
    (stored(count=-1), "a size that is no count"),
    (stored(count=2**70), "a size that is no count"),
    (stored(count="4"), "a size that is no count"),
    (built(stored(), 2, (2, 2), (2, 1)), "outside its storage of 4 values"),
    (built(stored(), 4, (1,), (1,)), "outside its storage of 4 values"),
    (built(stored(), 4, (), ()), "outside its storage of 4 values"),
    (built(stored(), 0, (5,), (1,)), "outside its storage of 4 values"),
    (built(stored(), 0, (2**40,), (0,)), "or repeats them"),
    (built(stored(), 0, (3, 2), (1, 1)), "or repeats them"),
    (built(stored(), -1, (1,), (1,)), "no count"),
    (built(stored(), 0, (-1,), (1,)), "no count"),
    (built(stored(), 3, (2,), (-1,)), "no count"),
    (built(stored(), 0, (2.0,), (1,)), "no count"),
    (built(stored(), True, (2,), (1,)), "no count"),
    (built(stored(), 0, (2**63,), (1,)), "no count"),
    (built(stored(), 0, (0, 2**62, 2**62), (1, 1, 1)), "is damaged"),
    (built(stored(), 0, (1,) * 65, (1,) * 65), "is damaged"),
    (built(stored(), 0, (2, 2), (1,)), "is damaged"),
    (built(plain("0"), 0, (1,), (1,)), "is damaged"),
    (built(stored(), 0, (4,), (1,), {"conj": True}), "conjugate or negative view"),
    # Pickles that end too soon, or take more than there is.
    (b"R", "is damaged"),
    (b"K\x01\x86R", "is damaged"),
    (b"t", "is damaged"),
    (b"h\x09", "is damaged"),
    (b"](K\x01u", "is damaged"),
    (b"}(K\x01u", "is damaged"),
    (b"X\xff\xff\xff\x7f", "is damaged"),
    (b"\x8a\xff", "is damaged"),
    (b"\xfe", "is damaged"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("body, message", _HOSTILE, ids=range(len(_HOSTILE)))
def test_hostile_and_broken_pickles_are_errors_of_value(tmp_path, form, body, message):
    path = make(tmp_path / "hostile.pth", form, body)
    with pytest.raises(ValueError, match=message) as error:
        torch_file.read(path)
    assert str(error.value).startswith(str(path))


def test_a_memo_with_a_far_index_takes_no_memory(tmp_path):
    # Python's own unpickler would make a list of 2**33 places.
    body = b"}r\xff\xff\xff\xff"
    assert torch_file.read(make(tmp_path / "memo.pth", "zip", body)) == {}


_LONG = b"](" + b"N" * 3000 + b"eq\x00"
_PAIRS = b"](" + b"K\x01N\x86" * 3000 + b"eq\x00"
_TEXT = plain("a" * 3000)  # which is q\x00 too
_ITEMS = b"}(" + b"".join(plain(n) + b"N" for n in range(3000)) + b"uq\x00"


@pytest.mark.parametrize("long, copy", [
    (_LONG, call("torch", "Size", b"h\x00")),
    (_PAIRS, call("collections", "OrderedDict", b"h\x00")),
    (_LONG, call("__builtin__", "set", b"h\x00")),
    (_TEXT, call("_codecs", "encode", b"h\x00", b"N")),
    (_TEXT, call("pathlib", "PosixPath", b"h\x00")),
    (_TEXT, call("torch", "device", b"h\x00")),
    (_ITEMS, call("argparse", "Namespace") + b"h\x00b"),
], ids=["size", "pairs", "set", "bytes", "path", "device", "namespace"])
def test_a_small_file_does_not_grow_by_copies(tmp_path, long, copy):
    path = make(tmp_path / "copies.pth", "zip", b"](" + long + copy * 1000 + b"e")
    with pytest.raises(ValueError, match="what it describes is larger than itself"):
        torch_file.read(path)


def test_pickles_of_another_protocol_name_the_cure(tmp_path):
    path = tmp_path / "four.pth"
    torch.save({"x": torch.zeros(2)}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match="pickle of protocol 4. Load it in PyTorch"):
        torch_file.read(path)


# Files that are damaged, or of another kind.


@pytest.mark.parametrize("name", [
    "ckpt_encoder_only.pth", "ckpt_encoder_only_legacy.pth"
])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, name):
    whole = (GOLDEN / name).read_bytes()
    path = tmp_path / "short.pth"
    for end in [*range(0, 3000, 97), *range(3000, len(whole), 2903), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=str(path)):
            torch_file.read(path)


@pytest.mark.parametrize("form", FORMS)
def test_any_changed_byte_is_read_or_an_error_of_value(tmp_path, form):
    arguments = argparse.Namespace(rate=np.float64(0.1), device=torch.device("cpu"))
    content = {"x": torch.arange(6.0).reshape(2, 3).T, "args": arguments}
    whole = save(content, tmp_path / "whole.pth", form).read_bytes()
    dice = random.Random(0)
    path = tmp_path / "changed.pth"
    refused = 0
    for position in range(0, len(whole), 2):
        changed = bytearray(whole)
        changed[position] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            ours = torch_file.read(path)
        except ValueError:
            refused += 1
        else:
            found = ours.values() if isinstance(ours, dict) else ()
            for value in found:
                if isinstance(value, tensor.Tensor):
                    assert value.size <= 6
                    assert value.read().shape == value.shape
    assert refused > 100


def test_keys_of_storages_that_are_no_strings_are_refused(tmp_path):
    path = make(tmp_path / "keys.pth", "legacy", b"}", storages={})
    head = path.read_bytes().removesuffix(pickle.dumps([], protocol=2))
    path.write_bytes(head + b"\x80\x02]" + _NESTED + b"a.")
    with pytest.raises(ValueError, match="a storage has no name"):
        torch_file.read(path)


def test_a_storage_with_a_wrong_count_is_refused(tmp_path):
    path = make(tmp_path / "count.pth", "legacy", _TENSOR)
    whole = path.read_bytes()
    for count in (-1, 5, 2**62):
        path.write_bytes(whole[:-24] + struct.pack("<q", count) + whole[-16:])
        with pytest.raises(ValueError, match="storage 0 ends after the file"):
            torch_file.read(path)
    path.write_bytes(whole[:-24] + struct.pack("<q", 3) + whole[-16:])
    with pytest.raises(ValueError, match="storage 0 is too short for 4 values"):
        torch_file.read(path)


def test_an_entry_that_is_not_where_the_archive_says_is_refused(tmp_path):
    path = make(tmp_path / "moved.pth", "zip", _TENSOR)
    whole = path.read_bytes()
    begin = whole.index(b"PK\x03\x04", 4)
    path.write_bytes(whole[:begin] + b"PK\x03\x05" + whole[begin + 4:])
    with pytest.raises(ValueError, match="data/0 is not where the archive says"):
        torch_file.read(path)
    # The length of the name in the header of the entry: the storage would end after
    # the file.
    path.write_bytes(whole[:begin + 26] + b"\xff\xff" + whole[begin + 28:])
    with pytest.raises(ValueError, match="data/0 is not where the archive says"):
        torch_file.read(path)


@pytest.mark.parametrize("compressed", ["data.pkl", "data/0"])
def test_compressed_entries_name_the_cure(tmp_path, compressed):
    path = tmp_path / "compressed.pth"
    source = make(tmp_path / "plain.pth", "zip", _TENSOR)
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(path, "w") as archive:
        for info in whole.infolist():
            deflated = info.filename.endswith(compressed)
            archive.writestr(
                info.filename, whole.read(info),
                zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED,
            )
    with pytest.raises(ValueError, match=f"{compressed} compressed .* torch.save"):
        torch_file.read(path)


def test_encrypted_entries_name_the_cure(tmp_path):
    path = make(tmp_path / "encrypted.pth", "zip", _TENSOR)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="data.pkl compressed or encrypted"):
        torch_file.read(path)


def test_tar_files_name_the_cure(tmp_path):
    path = tmp_path / "tar.pth"
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="is a tar archive .* torch.save"):
        torch_file.read(path)


def test_big_endian_files_are_refused(tmp_path):
    path = make(tmp_path / "big.pth", "zip", _TENSOR)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match="big-endian machine"):
        torch_file.read(path)
    path = make(tmp_path / "big.pth", "legacy", _TENSOR)
    whole = path.read_bytes()
    assert whole.count(b"little_endianq\x01\x88") == 1
    path.write_bytes(whole.replace(b"endianq\x01\x88", b"endianq\x01\x89"))
    with pytest.raises(ValueError, match="big-endian machine"):
        torch_file.read(path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "other.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    with pytest.raises(ValueError, match="does not begin as a file of torch.save"):
        torch_file.read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="other.pth"):
        torch_file.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(ValueError, match="expected one data.pkl inside, found 0"):
        torch_file.read(path)
    with pytest.raises(FileNotFoundError, match="No checkpoint .*gone.pth"):
        torch_file.read(tmp_path / "gone.pth")
