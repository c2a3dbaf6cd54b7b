"""What of a run must not lie in a bucket, or cannot without an extra, is said."""

import subprocess
import sys
from pathlib import Path

import pytest

import crossmae_jax
from crossmae_jax import errors, paths, train
from crossmae_jax.convert import ConversionError
from crossmae_jax.data import sources
from crossmae_jax.data.sets import digits, imagenet
from tests import bucket as buckets
from tests import tiny

ROOT = Path(__file__).parent.parent
RUN = f"gs://{buckets.NAME}/runs/one"


def test_what_must_lie_on_a_disk_says_so(tmp_path):
    with pytest.raises(ValueError, match="digits are written"):
        digits.prepare(f"gs://{buckets.NAME}/data")
    with pytest.raises(ValueError, match="gcloud storage cp"):
        imagenet.prepare(str(tmp_path), f"gs://{buckets.NAME}/data")
    with pytest.raises(ValueError, match="names no bucket"):
        paths.path("gs:///runs")
    for command in (
        ["sweep", "--config=configs/partialft_vitb.py", "--blocks=1"],
        ["evaluate", "--config=configs/vitb_cross.py", "--checkpoint=x", "--suite=knn"],
    ):
        found = subprocess.run(
            [sys.executable, "-m", "crossmae_jax", *command, f"--workdir={RUN}"],
            cwd=ROOT, capture_output=True, text=True,
        )
        assert found.returncode == 2 and "on a disk" in found.stderr, found.stderr


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, digits_dir):
    whole = paths.importlib.util.find_spec
    monkeypatch.setattr(
        paths.importlib.util, "find_spec",
        lambda name, *rest: None if name == "gcsfs" else whole(name, *rest),
    )
    message = rf"{RUN}.* gcsfs is needed.*pip install -e '.\[gcs\]'"
    with pytest.raises(errors.SetupError, match=message):
        train.run(tiny.config(digits_dir), RUN)
    with pytest.raises(ConversionError, match=message):
        crossmae_jax.load(RUN)
    with pytest.raises(ValueError, match="gcsfs is needed"):
        sources.FolderSource(f"gs://{buckets.NAME}/train")
