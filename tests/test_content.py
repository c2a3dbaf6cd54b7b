"""Images that changed under their names are noticed, those of them that are read."""

import json
import shutil

import numpy as np
import pytest

from configs import digits_cross
from crossmae_jax.data import bad_images, content, sources
from crossmae_jax.runs import workdir
from tests.image_files import encode, pixels, write


def _folder(place, count, *, changed=()):
    for k in range(count):
        image = encode(pixels(k + 1000 * (k in changed), 8, 8))
        write(place / f"{'ab'[k % 2]}" / f"{k:03}.png", image)
    return sources.FolderSource(str(place))


def _differing(before, source):
    now = content.digests(source)
    return content.differing(before, now, num_images=len(source))


def test_other_images_under_the_same_names_differ(tmp_path):
    source = _folder(tmp_path / "x", 12)
    before = content.digests(source)
    copy = _folder(tmp_path / "y", 12)
    assert _differing(before, copy) == []  # wherever they lie
    changed = _folder(tmp_path / "x", 12, changed=(3, 8))
    assert changed.fingerprint == source.fingerprint  # which is of names
    names = [changed.name(number)[-7:] for number in _differing(before, changed)]
    assert sorted(names) == ["003.png", "008.png"]
    encoded_anew = shutil.copytree(tmp_path / "y", tmp_path / "z")
    for path in encoded_anew.glob("*/*.png"):
        path.write_bytes(path.read_bytes() + b"\0")
    assert len(_differing(before, sources.FolderSource(str(encoded_anew)))) == 12


def test_of_many_images_256_are_read(tmp_path):
    class Many:
        read = []

        def __len__(self):
            return 1_281_167

        def __getitem__(self, index):
            self.read.append(index)
            return {"name": "", "image": np.full((1, 1, 1), index % 256, np.uint8)}

    source = Many()
    before = content.digests(source)
    assert len(before.split()) == 256 == len(set(source.read))
    assert min(source.read) == 0 and max(source.read) > 1_270_000
    # Evenly: no gap is much longer than another.
    assert set(np.diff(sorted(source.read))) == {5004, 5005}
    assert content.differing(before, before, num_images=len(source)) == []
    assert content.differing("12 34", before, num_images=len(source)) is None


def test_labels_and_forms_of_arrays_are_content():
    class One:
        def __init__(self, **record):
            self.record = record

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return self.record

    row = np.arange(4, dtype=np.uint8)
    variants = [
        One(image=b"x"), One(image=b"x", label=0), One(image=b"x", label=1),
        One(image=row.reshape(2, 2, 1)), One(image=row.reshape(1, 4, 1)),
    ]
    assert len(set(map(content.digests, variants))) == len(variants)


def _dataset(source):
    return {
        "num_images": len(source), "fingerprint": source.fingerprint,
        "classes": list(source.classes), "content": content.digests(source),
    }


def _claim(place, source, *, resuming=True):
    workdir.claim(
        place, digits_cross.get_config(), dataset=_dataset(source), resuming=resuming,
        image_name=source.name,
    )


def test_a_run_does_not_go_on_with_other_images_of_the_same_names(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    source = _folder(data, 10)
    _claim(run, source, resuming=False)
    _claim(run, source)
    changed = _folder(data, 10, changed=(4, 5, 6))
    with pytest.raises(ValueError) as caught:
        _claim(run, changed)
    assert (
        "dataset.json differs:\n  content: 3 of 10 images that were looked at hold "
        f"something else, first {data}/a/004.png\nGo on with the old"
    ) in str(caught.value)
    # What was refused is not what is remembered.
    _claim(run, _folder(data, 10))


def test_a_bad_image_may_be_repaired(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    _folder(data, 10)
    (data / "a/002.png").write_bytes(b"damaged")
    (data / "b/007.png").unlink()
    (data / "b/007.png").symlink_to("nowhere")  # not even read
    source = sources.FolderSource(str(data))
    _claim(run, source, resuming=False)
    (data / "b/007.png").unlink()
    repaired = _folder(data, 10)
    with pytest.raises(ValueError, match="content: 1 of 10 .*, first .*a/002.png"):
        _claim(run, repaired)
    found = bad_images.Bad(f"{data}/a/002.png", reason="", index=1, sample=3)
    line = json.dumps(found._asdict())
    (run / "bad_images.process_1.jsonl").write_text(f'{line}\n{{"name": "cut sh')
    _claim(run, repaired)
    _claim(run, repaired)


def test_runs_from_before_go_on_with_a_line(tmp_path, capsys):
    run, source = tmp_path / "run", _folder(tmp_path / "data", 4)
    _claim(run, source, resuming=False)
    path = run / "dataset.json"
    stored = json.loads(path.read_text())
    del stored["content"]
    path.write_text(json.dumps(stored))
    assert capsys.readouterr().out == ""
    _claim(run, source)
    assert capsys.readouterr().out == (
        f"{path} is from before the content of images was noted: whether it is the "
        "same cannot be told. From now on it can.\n"
    )
    _claim(run, source)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="content: 1 of 4"):
        _claim(run, _folder(tmp_path / "data", 4, changed=(2,)))
