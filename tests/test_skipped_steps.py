"""A run with steps that are not finite: it goes on, or ends and says what was first."""

import io
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import __main__ as front_door
from crossmae_jax import errors, objectives, train
from crossmae_jax.data import sources
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.probing import nonfinite
from crossmae_jax.runs import journal, replay
from tests import full_disk, processes, tiny
from tests.test_processes import arguments

# 96 images a step: rows 5 and 40 of steps 3 to 6, counted from 1.
POISON = tuple(96 * step + row for step in range(2, 6) for row in (5, 40))
STEPS = 10


class Poisoned(Pretrain):
    """Masked pre-training that some images overflow in."""

    def normalize(self, batch):
        images = super().normalize(batch)
        if "sample" not in batch:
            return images
        poisonous = jnp.isin(batch["sample"], jnp.asarray(POISON, jnp.uint32))
        return jnp.where(poisonous[:, None, None, None], 1e38, images) * 10


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "pretrain", Poisoned)


def config_of(digits_dir, **changes):
    return tiny.config(digits_dir, **{
        "epochs": (STEPS + 0.5) * 96 / 1442, "checkpoint__every_epochs": 4 * 96 / 1442,
        "checkpoint__keep": 3, "log_every_steps": 20,
    } | changes)


@pytest.fixture(scope="module")
def gone_on(digits_dir, tmp_path_factory):
    """A run of ten steps of which four in the middle are skipped."""
    workdir = tmp_path_factory.mktemp("gone_on")
    config = config_of(digits_dir, log_every_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(objectives.OBJECTIVES, "pretrain", Poisoned)
        train.run(config, workdir)
    return workdir, config


def copy_until(workdir, step, target):
    """Copies a run as it was when it had saved a step."""
    shutil.copytree(workdir, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def test_a_run_goes_on_past_skipped_steps_and_its_log_tells_of_them(gone_on):
    workdir, config = gone_on
    lines = {line["step"]: line for line in tiny.lines(workdir)}
    assert list(lines) == list(range(1, STEPS + 1))
    in_all = [line["train/skipped_steps"] for line in lines.values()]
    assert in_all == [0, 0, 1, 2, 3, 4, 4, 4, 4, 4]
    in_a_row = [line["train/skipped_in_a_row"] for line in lines.values()]
    assert in_a_row == [0, 0, 1, 2, 3, 4, 0, 0, 0, 0]
    for step, line in lines.items():
        assert (line["train/loss"] is None) == (step in range(3, 7))
    state = tiny.final_state(config, workdir, STEPS)
    assert state.skipped == {"total": 4, "in_a_row": 0}
    assert not list(workdir.glob("nan_step_*"))


def test_too_many_in_a_row_end_the_run_with_a_step_to_make_again(
    gone_on, digits_dir, tmp_path, capsys
):
    workdir, _ = gone_on
    # Two of them before it was interrupted; nothing is logged until step 8 is saved.
    copy_until(workdir, 4, tmp_path / "run")
    config = config_of(digits_dir, optim__max_skipped_in_a_row=4)
    with pytest.raises(journal.NotFinite) as caught:
        train.run(config, tmp_path / "run")
    path = tmp_path / "run" / "nan_step_3.npz"
    for text in (
        "Not finite 4 times in a row: loss nan, length of the gradient nan.",
        "These are steps 3 to 6; they have changed no weight since step 2.",
        f"python -m crossmae_jax debug-nan {path} names the first bad tensor",
        "config.optim.base_lr", "config.optim.max_skipped_in_a_row=4",
    ):
        assert text in str(caught.value)
    assert "step 6 was skipped and changed no weight" in capsys.readouterr().err
    kept = replay.read(path)
    assert (kept.step, kept.in_a_row) == (3, 4)
    assert kept.config.optim.max_skipped_in_a_row == 4
    np.testing.assert_array_equal(kept.batch["sample"], np.arange(192, 288))
    # No weight has changed since step 2, so those of the checkpoint of step 4 are it.
    copy_until(workdir, 4, tmp_path / "four")
    before = tiny.final_state(config, tmp_path / "four", 4).variables
    tiny.assert_same_bits(before, jax.tree.map(jnp.asarray, kept.variables))
    found = nonfinite.diagnose(kept)
    assert found.images == [5, 40]
    assert found.first_bad.name == "model: input"

    # More are allowed now: it goes on, and past them, as if it had never stopped.
    config.optim.max_skipped_in_a_row = 5
    train.run(config, tmp_path / "run")
    ours, theirs = (
        tiny.final_state(config, path, STEPS) for path in (tmp_path / "run", workdir)
    )
    tiny.assert_same_bits(ours, theirs)
    uninterrupted = {line["step"]: line for line in tiny.lines(workdir)}
    lines = tiny.lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 8, 10]
    for line in lines:
        for name in ("loss", "lr", "skipped_steps", "skipped_in_a_row"):
            name = f"train/{name}"
            assert line[name] == uninterrupted[line["step"]][name]


@pytest.fixture(scope="module")
def kept(digits_dir, tmp_path_factory):
    """The file of a healthy step, and the config; its weights may be changed."""
    directory = tmp_path_factory.mktemp("kept")
    config = config_of(digits_dir)
    variables = jax.jit(Pretrain(config).init)(jax.random.key(0))
    state = train.TrainState(
        jnp.asarray(2), variables, (),
        {"total": jnp.asarray(2), "in_a_row": jnp.asarray(1)},
    )
    path, failed = replay.keep(
        directory, config, sources.make_source(config.data, "train"), state,
        key=jax.random.key(3, impl="threefry2x32"),
    )
    assert failed == "" and path.name == "nan_step_2.npz"
    assert [x.name for x in directory.iterdir()] == [path.name]
    return path


def changed(path, target, **arrays):
    """Writes a file of a step once more, with some of its arrays changed."""
    with np.load(path) as file:
        values = {name: file[name] for name in file.files}
    for name, index in arrays.items():
        name = name.replace("__", "/")
        values[name] = values[name].copy()
        values[name][index] = np.inf
    np.savez(target, **values)
    return target


def test_a_step_that_is_finite_here_is_said_to_be(kept, capsys):
    assert front_door.main(["debug-nan", str(kept)]) == 0
    said = capsys.readouterr().out
    assert "Step 2, 96 images" in said
    assert "tensors are finite: try again on the device that the run was on" in said


@pytest.mark.parametrize("tensor, part", [
    ("encoder/blocks_1/mlp/fc1/bias", "encoder/blocks_1"),
    ("decoder/decoder_blocks_0/cross_attn/q/bias", "decoder/decoder_blocks_0"),
])
def test_a_bad_weight_is_named_with_its_block(kept, tmp_path, capsys, tensor, part):
    arrays = {f"variables/params/{tensor}": 1}
    path = changed(kept, tmp_path / "bad.npz", **arrays)
    assert front_door.main(["debug-nan", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"First bad tensor: parameter {tensor} (block {part})"
    assert said[2] == "Images: all of 96"
    row = next(line for line in said if line.startswith(f"| parameter {tensor}"))
    assert row.split("|")[-2].strip() == "yes"


def test_images_are_named_whatever_the_parts_of_the_batch(kept, capsys):
    step = replay.read(kept)
    sample = step.batch["sample"].copy()
    sample[[7, 90]] = POISON[:2]
    step.batch["sample"] = sample
    for parts in (1, 6):
        found = nonfinite.diagnose(step, parts=parts)
        assert found.images == [7, 90]
        for row in (7, 90):
            assert f"{step.names[row]} " in str(found)
        assert step.names[8] not in str(found)
    assert "| encoder/patch_embed: input" in str(found)
    assert front_door.main(["debug-nan", str(kept), "--parts=5"]) == 1
    assert "--parts=5: expected a number that divides the 96" in capsys.readouterr().err


class BadGradient(Pretrain):
    """Its loss is finite; the slope of a root at 0, or the length, is not."""

    def loss(self, variables, batch, key):
        value, aux = super().loss(variables, batch, key)
        if self.config.seed == 1:
            token = variables["params"]["encoder"]["cls_token"]
            value += jnp.sqrt(0 * token).sum()
        if self.config.seed == 2:
            value += 1e25 * variables["params"]["encoder"]["cls_token"].sum()
        return value, aux

    def prediction_loss(self, predicted, target, ids):
        value, aux = super().prediction_loss(predicted, target, ids)
        if self.config.seed == 0:
            pred = predicted["pixels"].values
            others = (jnp.arange(pred.shape[0]) != 11)[:, None, None]
            value += jnp.sqrt(others + 0 * pred).mean()
        return value, aux


@pytest.mark.parametrize("seed, name, images", [
    (0, "model: gradient of the output", [11]),
    (1, "gradient of encoder/cls_token", list(range(96))),
    (2, "length of the gradient", list(range(96))),
])
def test_a_gradient_is_named_where_all_before_it_is_finite(
    kept, monkeypatch, seed, name, images
):
    monkeypatch.setitem(objectives.OBJECTIVES, "pretrain", BadGradient)
    step = replay.read(kept)
    step.config.seed = seed
    found = nonfinite.diagnose(step)
    assert (found.first_bad.name, found.images) == (name, images)
    if seed == 2:  # what makes it long is shown first
        table = [line for line in str(found).splitlines() if line.startswith("|")]
        assert table[2].startswith("| gradient of encoder/cls_token ")
        assert "1e+25" in table[2]


def test_what_is_no_such_file_is_refused_in_a_line(kept, tmp_path, capsys):
    whole = kept.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.npz").write_text("nothing of the kind")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("cut", "text", "other"):
        assert front_door.main(["debug-nan", str(tmp_path / f"{name}.npz")]) == 1
        assert "is not the file of a step to make again" in capsys.readouterr().err
    with pytest.raises(errors.SetupError, match="give a nan_step"):
        replay.read(tmp_path / "cut.npz")
    assert front_door.main(["debug-nan", str(tmp_path / "none.npz")]) == 1
    assert "No such file" in capsys.readouterr().err


def _archive(path, **members):
    """Writes an .npz of members that are arrays, or bytes as they are."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            if not isinstance(content, bytes):
                array, content = content, io.BytesIO()
                np.save(content, array)
                content = content.getvalue()
            file.writestr(f"{name}.npy", content)
    return path


def _header(shape):
    """Returns an .npy file of a header alone."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("about", [
    np.array('{"dtypes": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    np.array("[" * 10_000), np.array("[1]"), _header(f"({2**42},)"),
    _header(f"({2**80},)"), _header("(" * 5000), _header("((1,)"), b"", b"\x93NUMPY",
], ids=range(9))
def test_whatever_the_file_claims_it_is_refused_in_a_line(tmp_path, capsys, about):
    path = _archive(tmp_path / "bad.npz", about=about)
    assert front_door.main(["debug-nan", str(path)]) == 1
    error, = capsys.readouterr().err.splitlines()
    assert "bad.npz is not the file of a step to make again, or is damaged (" in error


@pytest.mark.parametrize("field, value", [
    (8, 77), (4, 198),  # an unknown compression; a version of a far future
    (6, 1),  # encrypted
])
def test_an_archive_that_cannot_be_read_here_is_refused(tmp_path, field, value):
    path = _archive(tmp_path / "bad.npz", about=np.array("{}"))
    data = bytearray(path.read_bytes())
    data[field] = data[data.index(b"PK\x01\x02") + field + 2] = value
    path.write_bytes(data)
    with pytest.raises(errors.SetupError, match="is damaged"):
        replay.read(path)


def test_a_file_that_cannot_be_written_hides_nothing(kept, digits_dir, tmp_path):
    config = config_of(digits_dir)
    step = replay.read(kept)
    state = train.TrainState(
        jnp.asarray(2), jax.tree.map(jnp.asarray, step.variables), (),
        {"total": jnp.asarray(2), "in_a_row": jnp.asarray(1)},
    )
    (tmp_path / "nan_step_2.npz").mkdir()
    _, failed = replay.keep(
        tmp_path, config, sources.make_source(config.data, "train"), state,
        key=step.key,
    )
    assert "directory" in failed
    full = tmp_path / "full"
    full.mkdir()
    with full_disk.beyond(kept.stat().st_size // 2):
        path, failed = replay.keep(
            full, config, sources.make_source(config.data, "train"), state,
            key=step.key,
        )
    assert failed == f"[Errno 27] File too large: '{path}'"
    assert list(full.iterdir()) == [], "nothing of it stays on the full disk"


def test_several_processes_end_at_the_same_step_and_one_keeps_it(digits_dir, tmp_path):
    given = arguments(digits_dir, tmp_path / "run", **{
        "optim.base_lr": 1e30, "optim.warmup_epochs": 0.0, "mesh.fsdp": 4,
        "log_every_steps": 50,
    })
    with processes.started([given] * 2, tmp_path / "logs") as group:
        assert group.wait() == [1, 1], group.all_said()
        for i in range(2):
            assert "error: Not finite 5 times in a row" in group.said(i)
            assert "nan_step_2.npz names the first bad" in group.said(i)
    kept = replay.read(tmp_path / "run" / "nan_step_2.npz")
    np.testing.assert_array_equal(kept.batch["sample"], np.arange(64, 128))
    bias = kept.variables["params"]["encoder"]["blocks_1"]["mlp"]["fc1"]["bias"]
    assert bias.shape == (128,)
    assert nonfinite.diagnose(kept).first_bad.part == "encoder/blocks_0"

    # Where that fails all say so, and so none has left before process 0 had tried.
    (tmp_path / "run" / "nan_step_2.npz").unlink()
    (tmp_path / "run" / "nan_step_2.npz").mkdir()
    with processes.started([given] * 2, tmp_path / "again") as group:
        assert group.wait() == [1, 1], group.all_said()
        for i in range(2):
            assert "Step 2 cannot be kept in" in group.said(i)
            assert "Is a directory: '" in group.said(i)
