"""Analyses over a data set, and the commands that run them, on files of images."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

import crossmae_jax
from crossmae_jax import __main__ as front_door
from crossmae_jax.data import sources
from crossmae_jax.data.sets import digits
from crossmae_jax.evals import reconstruction
from crossmae_jax.probing import decoder_analysis
from tests.saved_runs import save_run
from tests.test_convert import GOLDEN
from tests.test_visualize import pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(7):
        pixels = random.integers(0, 256, (20, 24), np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    return {
        name: save_run(directory / name, f"digits_{name}", "model.dtype=float32")
        for name in ("mae", "cross", "cross_prmim")
    }


@pytest.mark.parametrize("batch_size", [3, 7])
def test_a_data_set_is_the_mean_over_its_images(runs, folder, batch_size):
    model = crossmae_jax.load(runs["mae"])
    source = sources.FolderSource(str(folder))
    found = decoder_analysis.attention(
        model, source, batch_size=batch_size, seed=4, progress=False
    )
    paths = [str(folder / f"{number}.png") for number in range(7)]
    each = model.attention_magnitudes(paths, seed=4)
    np.testing.assert_allclose(found.visible, each.visible.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.masked, each.masked.mean(0), rtol=1e-5)
    total = found.num_visible * found.visible + found.num_masked * found.masked
    np.testing.assert_allclose(total, model.model.decoder.num_heads, rtol=1e-5)


def test_ablations_are_scored_on_the_same_masks(runs, folder):
    model = crossmae_jax.load(runs["mae"])
    scores = decoder_analysis.ablations(
        model, sources.FolderSource(str(folder)), batch_size=4, progress=False
    )
    assert list(scores) == ["full", "without masked", "without visible"]
    paths = [str(folder / f"{number}.png") for number in range(7)]
    for name, kind in zip(scores, (None, "masked", "visible"), strict=True):
        each = model.reconstruct(paths, without=kind)
        expected = each.error.sum() / each.mask.sum()
        assert scores[name].mse == pytest.approx(expected, rel=1e-5)
        assert scores[name].psnr == pytest.approx(reconstruction.psnr(each).mean())
        assert scores[name].num_images == 7
    assert len({round(score.mse, 6) for score in scores.values()}) == 3


def test_psnr_is_of_hidden_patches_in_256_levels():
    """Truth 0.2 is 51, the prediction 0.9 just below 229.5, so 229: an error of 178."""
    found = reconstruction.psnr(pictures(num=2))
    np.testing.assert_allclose(found, 20 * np.log10(255 / 178), rtol=1e-6)
    perfect = pictures()._replace(pasted=pictures().image)
    assert np.isinf(reconstruction.psnr(perfect)).all()


def test_an_image_of_one_colour_is_left_out_of_the_mean_ratio(runs, tmp_path):
    """Its patches have no deviation, so any prediction of it is perfect."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.new("L", (16, 16), 128).save(tmp_path / "blank.png")
    model = crossmae_jax.load(runs["mae"])
    ratios = reconstruction.psnr(
        model.reconstruct([tmp_path / "blank.png", tmp_path / "noise.png"])
    )
    assert np.isinf(ratios[0]) and np.isfinite(ratios[1])
    expected = {"psnr": ratios[1], "psnr_left_out": 1.0}
    assert reconstruction.mean_psnr(ratios) == pytest.approx(expected)
    assert reconstruction.mean_psnr(ratios[:1]) == {"psnr_left_out": 1.0}
    score = decoder_analysis.ablations(
        model, sources.FolderSource(str(tmp_path)), progress=False
    )["full"]
    assert score.psnr == pytest.approx(ratios[1]) and score.num_images == 2


def run_command(arguments, capsys):
    status = front_door.main(list(map(str, arguments)))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_attention_command_writes_table_and_picture(
    runs, folder, tmp_path, capsys
):
    status, out, _ = run_command([
        "attention", f"--checkpoint={runs['mae']}", f"--dir={folder}",
        f"--to={tmp_path / 'found'}", "--num_images=5", "--batch_size=2", "--seed=1",
        "--mask_ratio=0.5",
    ], capsys)
    assert status == 0
    text = (tmp_path / "found" / "attention.md").read_text()
    assert text in out and "5 images, 8 masked keys" in text
    rows = [
        [float(x.strip(" %")) for x in line.split("|")[2:5]]
        for line in text.splitlines() if re.match(r"\| (\d+|sum) +\|", line)
    ]
    visible, masked, share = rows[-1]
    # 9 visible keys with the class token, 8 masked: 2 heads a block; three digits.
    assert 9 * visible + 8 * masked == pytest.approx(2 * (len(rows) - 1), abs=0.02)
    assert 0 < share < 100
    assert "| without visible |" in text
    with Image.open(tmp_path / "found" / "attention.png") as picture:
        assert picture.size[0] > 800


def test_the_attention_command_decodes_no_larger_images_than_it_may(
    runs, folder, tmp_path, capsys
):
    status, _, err = run_command([
        "attention", f"--checkpoint={runs['mae']}", f"--dir={folder}",
        f"--to={tmp_path}", "--max_pixels=3",
    ], capsys)
    assert status == 1 and "data.max_pixels=3 is the most that is decoded" in err


def test_the_attention_command_says_and_limits_what_it_skips(
    runs, folder, tmp_path, capsys
):
    images = shutil.copytree(folder, tmp_path / "images")
    for number in range(3):
        (images / f"{number}.heic").write_bytes(b"")
    command = [
        "attention", f"--checkpoint={runs['cross']}", f"--dir={images}",
        f"--to={tmp_path / 'out'}",
    ]
    status, _, err = run_command(command, capsys)
    assert status == 1 and "3 of 10 images are of a kind that is not read" in err
    status, out, _ = run_command([*command, "--max_skipped_share=0.3"], capsys)
    assert status == 0 and "Images: 7 images, no labels, in" in out
    assert "; skipped: 3 .heic (no kind" in (tmp_path / "out/attention.md").read_text()
    command[2] = "--tfds=sklearn_digits"
    with pytest.raises(SystemExit):
        front_door.main([*command, "--max_skipped_share=0.3"])
    assert "is of --dir, and not of --tfds" in capsys.readouterr().err


def test_a_decoder_without_self_attention_has_no_ablations(
    runs, folder, tmp_path, capsys
):
    status, out, _ = run_command([
        "attention", f"--checkpoint={runs['cross']}", f"--dir={folder}",
        f"--to={tmp_path}",
    ], capsys)
    assert status == 0 and "no masked keys" in out and "| without" not in out
    assert re.search(r"\| sum +\| +[\d.]+ \| +0.000 \| +100.0 % \|", out)


def test_a_prepared_data_set_is_read_by_workers(runs, digits_dir, tmp_path, capsys):
    digits.prepare(digits_dir)
    status, out, _ = run_command([
        "attention", f"--checkpoint={runs['cross']}", "--tfds=sklearn_digits",
        f"--data_dir={digits_dir}", "--split=test", f"--to={tmp_path}",
        "--num_images=6", "--workers=1",
    ], capsys)
    assert status == 0 and "6 images" in out


def test_the_reconstruct_command_draws_a_row_per_image_ratio_and_seed(
    runs, folder, tmp_path, capsys
):
    status, out, _ = run_command([
        "reconstruct", f"--checkpoint={runs['cross_prmim']}", folder / "0.png",
        folder / "1.png", f"--to={tmp_path / 'panel.png'}", "--mask_ratios=0.5,0.75",
        "--seeds=0,1",
    ], capsys)
    assert status == 0
    lines = [line for line in out.splitlines() if "PSNR" in line]
    assert len(lines) == 8
    assert lines[0].startswith(f"{folder / '0.png'}: 50 % masked, seed 0: PSNR ")
    assert "colours and contrast are not evidence" in out
    with Image.open(tmp_path / "panel.png") as panel:
        width, height = panel.size
    assert height > 8 * 190 and width > 5 * 190  # thrown patches have a column


@pytest.mark.parametrize("arguments, said", [
    (["--to=panel.jpg"], "--to=panel.jpg must end in .png."),
    (["--to=panel.png", "--mask_ratios=1.5"], "mask_ratio=1.5 must lie between"),
    (["--to=panel.png", "--step=99"], "99"),
    (["--to=panel.png", "--seeds=-1"], "seed=-1"),
])
def test_what_cannot_be_drawn_is_said(runs, folder, capsys, arguments, said):
    status, _, err = run_command([
        "reconstruct", f"--checkpoint={runs['cross']}", folder / "0.png", *arguments,
    ], capsys)
    assert status == 1 and said in err


def test_a_damaged_image_is_named_and_nothing_takes_its_place(
    runs, folder, tmp_path, capsys
):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"no image")
    command = [
        "attention", f"--checkpoint={runs['mae']}", f"--dir={tmp_path}",
        f"--to={tmp_path / 'found'}",
    ]
    status, _, err = run_command(command, capsys)
    assert status == 1 and "3.png" in err and "Repair or remove it" in err
    status, _, err = run_command([*command, "--num_images=0"], capsys)
    assert status == 1 and "num_images=0 must be 1 or more" in err


@pytest.mark.parametrize("command, said", [
    (["attention", "--dir=D", "--split=train"], "--split are of --tfds"),
    (["reconstruct", "a.png", "--seeds="], "--seeds is empty"),
])
def test_flags_that_contradict_each_other_are_refused(command, said, capsys):
    with pytest.raises(SystemExit):
        front_door.main([*command, "--checkpoint=C", "--to=T.png"])
    assert said in capsys.readouterr().err


def test_a_missing_image_and_a_missing_decoder_are_said(runs, folder, tmp_path, capsys):
    status, _, err = run_command([
        "reconstruct", f"--checkpoint={runs['cross']}", folder / "none.png",
        f"--to={tmp_path / 'panel.png'}",
    ], capsys)
    assert status == 1 and "none.png" in err
    encoder = GOLDEN / "ckpt_encoder_only.pth"
    status, _, err = run_command([
        "reconstruct", f"--checkpoint={encoder}", "--num_heads=2", folder / "0.png",
        f"--to={tmp_path / 'panel.png'}",
    ], capsys)
    assert status == 1 and "has no decoder, only encoder" in err
    assert not (tmp_path / "panel.png").exists()
