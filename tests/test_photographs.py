"""Real photographs, from JPEG files through the loader to the classifiers."""

import jax
import numpy as np
import pytest
from PIL import Image

from crossmae_jax import evals
from crossmae_jax.data import pipeline, sources
from crossmae_jax.distributed import parallel
from crossmae_jax.evals import evaluator, features
from tests import image_files, photographs

CHANCE = 1 / len(photographs.NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photographs")
    return photographs.write(directory, num_train=24, num_test=8, size=24)


def test_there_is_a_folder_for_each_photograph_and_no_crop_twice(folders):
    names = {name.partition(".")[0] for name in photographs.NAMES}
    seen = set()
    for folder, count in zip(folders, (24, 8)):
        assert {path.name for path in folder.iterdir()} == names
        for path in folder.glob("*/*.jpg"):
            with Image.open(path) as image:
                assert image.format == "JPEG" and image.size == (24, 24)
                seen.add(image.tobytes())
        assert len(list(folder.glob("*/*.jpg"))) == count * len(names)
    assert len(seen) == (24 + 8) * len(names)


def test_raw_pixels_of_photographs_tell_classes_above_chance(folders):
    data = image_files.config(
        image_size=(8, 8), dir=str(folders[0]), eval_dir=str(folders[1]),
        eval_crop_ratio=1.0,
    )
    opened = {split: sources.make_source(data, split) for split in ("train", "eval")}
    num_images = {split: len(source) for split, source in opened.items()}
    evaluators = evals.make(dict(
        knn=dict(k=(5, 20), temperature=0.07),
        linear=dict(l2s=(0.1,), max_train_images=200),
    ))
    evaluator.check(evaluators, evaluator.About(
        num_images=num_images, num_classes=12, outputs=frozenset({"features"})
    ))
    mesh = parallel.make_mesh(jax.devices()[:2])

    def batches(split, num_images):
        with pipeline.eval_batches(
            opened[split], data, batch_size=50, num_images=num_images
        ) as made:
            yield from made

    evaluation = evaluator.Evaluation(
        batches=batches, num_images=num_images,
        place=lambda batch: parallel.place_batch(mesh, batch),
        predict=features.raw_pixels(mean=tuple(data.mean), std=tuple(data.std)),
        wanted=evaluator.wanted(evaluators.values()),
    )
    found = {name: each.run(evaluation).metrics for name, each in evaluators.items()}
    # Evenly spread: every class is among the 200 of 288 images for the probe.
    fewer = evaluation.features_of("train", 200)
    assert len(np.unique(fewer.labels)) == 12
    for top1 in (found["knn"]["top1"], found["linear"]["top1"]):
        assert 2.5 * CHANCE < top1 < 1.0, found
