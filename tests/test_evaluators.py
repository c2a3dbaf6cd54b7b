"""Evaluators as the train loop calls them: sharing, options, pictures, the table."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import errors, evals, visualize
from crossmae_jax.evals import evaluator, features, knn, rank
from tests.test_features import PIXELS, batches, images_of, placer
from tests.test_knn import brute_force

F64_RTOL = 1e-12


class Pictures(NamedTuple):
    image: jax.Array
    prediction: jax.Array
    pasted: jax.Array
    mask: jax.Array
    thrown: jax.Array
    error: jax.Array
    target: jax.Array | None = None


@jax.jit
def reconstruct(batch, thrown):
    """Pictures of 5 patches, 2 x 2 pixels each, of which all but the first are masked.

    The error of a masked patch is the image's sample number, and 100 more if it is
    thrown. What must not count has an error of a million: visible patches and padding.
    """
    image = batch["image"] / 255.0
    mask = jnp.ones((8, 5), bool).at[:, 0].set(False)
    thrown = jnp.broadcast_to(thrown[None], mask.shape)
    error = batch["sample"][:, None] + 100.0 * thrown
    error = jnp.where(mask & batch["valid"][:, None], error, 1e6)
    return Pictures(image, 1 - image, image, mask, thrown, error)


def evaluation_of(
    images, labels, tmp_path, *, splits=("train", "eval"), thrown=(), log=None,
    **changes,
):
    """An Evaluation of two splits of the same images, with pictures made by hand."""
    log = [] if log is None else log
    thrown = np.isin(np.arange(5), thrown)

    def split_batches(split, num_images):
        log.append((split, num_images))
        return batches(images[:num_images], labels[:num_images], 8)

    return evaluator.Evaluation(**dict(
        batches=split_batches,
        num_images=dict.fromkeys(splits, len(images)),
        place=placer(8),
        predict=PIXELS,
        give=lambda name, batch: {"reconstruction": reconstruct}[name](batch, thrown),
        captions={"reconstruction": "made by hand"},
        directory=tmp_path,
        name="step_00000007",
    ) | changes)


def run(name, evaluation, **options):
    """The result of one evaluator with its options from `config.evals`."""
    return evals.make({name: options})[name].run(evaluation)


def wanted(options):
    return evaluator.wanted(evals.make(options).values())


def test_knn_and_linear_share_the_features_of_both_splits(tmp_path):
    log = []
    evaluation = evaluation_of(*images_of(120), tmp_path, log=log)
    knn_result = run("knn", evaluation, every_epochs=5.0, k=1, temperature=0.07)
    linear_result = run("linear", evaluation, every_epochs=0.0, l2s=(0.01,))
    assert sorted(log) == [("eval", None), ("train", None)]
    assert knn_result == evaluator.Result({"top1": 1.0})  # its own nearest neighbour
    assert set(linear_result.metrics) == {"top1", "l2"}


def test_fewer_train_images_are_asked_for_not_thrown_away(tmp_path):
    log = []
    evaluation = evaluation_of(*images_of(50), tmp_path, log=log)
    options = dict(k=1, temperature=0.07)
    run("knn", evaluation, **options, max_train_images=20)
    assert log == [("train", 20), ("eval", None)]
    run("knn", evaluation, **options, max_train_images=10**6)
    assert log == [("train", 20), ("eval", None), ("train", None)]


def test_more_neighbours_than_images_with_a_label_are_refused_by_their_number(tmp_path):
    images, labels = images_of(50)
    labels[7:] = -1
    with pytest.raises(errors.SetupError, match="k=9 neighbours, but only 7 of the tr"):
        run("knn", evaluation_of(images, labels, tmp_path), k=(2, 9), temperature=0.07)


VIEWS = frozenset({"features", "class_token", "logits"})


@jax.jit
def encode(batch):
    """Two views of an image, and a guess: class 0."""
    pixels = PIXELS(batch)["features"]
    return {
        "features": pixels, "class_token": jnp.tanh(pixels[:, :7] + 0.3),
        "logits": jnp.zeros((8, 4)),
    }


def views(images, labels):
    """What `encode` makes of all images, by its output."""
    pixels = features.extract(
        PIXELS, batches(images, labels, 8), placer(8), num_images=len(images)
    )["features"]
    return {
        "mean": pixels,
        "cls": pixels._replace(values=np.tanh(pixels.values[:, :7] + np.float32(0.3))),
    }


def test_everything_wanted_of_a_split_is_extracted_in_one_pass(tmp_path):
    images, labels = images_of(60)
    log = []
    options = dict(
        knn=dict(k=(5, 20), temperature=0.5, pools=("mean", "cls")),
        linear=dict(l2s=(0.1,), max_iterations=9), accuracy={},
    )
    evaluation = evaluation_of(
        images, labels, tmp_path, log=log, predict=encode, rows=VIEWS,
        wanted=wanted(options),
    )
    found = {
        name: each.run(evaluation).metrics
        for name, each in evals.make(options).items()
    }
    assert sorted(log) == [("eval", None), ("train", None)]
    assert found["accuracy"]["top1"] == np.mean(labels == 0)
    assert set(found["knn"]) == {
        "top1", "mean/k5/top1", "mean/k20/top1", "cls/k5/top1", "cls/k20/top1"
    }
    for pool, view in views(images, labels).items():
        for k in (5, 20):
            top1, _ = brute_force(view, view, k=k, temperature=0.5)
            assert found["knn"][f"{pool}/k{k}/top1"] == pytest.approx(top1)
    assert found["knn"]["top1"] == found["knn"]["mean/k5/top1"]
    assert len(set(found["knn"].values())) > 2


def test_only_what_is_wanted_of_the_same_images_is_extracted_with_them(tmp_path):
    log = []
    options = dict(
        knn=dict(k=1, temperature=0.07, pools=("cls",), max_train_images=20),
        linear=dict(l2s=(0.1,), max_iterations=9, max_train_images=10**6),
    )
    evaluation = evaluation_of(
        *images_of(50), tmp_path, log=log, predict=encode, rows=VIEWS,
        wanted=wanted(options),
    )
    for each in evals.make(options).values():
        each.run(evaluation)
    assert log == [("train", 20), ("eval", None), ("train", None)]
    assert set(evaluation._extracted) == {
        ("train", 20, "class_token"), ("train", 50, "features"),
        ("eval", 50, "class_token"), ("eval", 50, "features"),
    }


@pytest.mark.parametrize("splits", [("train", "eval"), ("train",)])
@pytest.mark.parametrize("limit, taken", [(None, 60), (21, 21)])
def test_the_rank_is_that_of_the_real_images_and_needs_no_labels(
    tmp_path, splits, limit, taken
):
    images, _ = images_of(60)
    labels = np.full(60, -1, np.int32)
    log, options = [], dict(rank=dict(every_epochs=1.0, max_images=limit))
    evaluation = evaluation_of(
        images, labels, tmp_path, splits=splits, log=log,
        wanted=wanted(options),
    )
    found = run("rank", evaluation, **options["rank"]).metrics
    assert log == [(splits[-1], None if taken == 60 else taken)]
    rows = views(images, labels)["mean"].values[:taken].astype(np.float64)
    assert found == {"effective": pytest.approx(
        rank.effective_rank(rows), rel=1e-6
    )}


def test_the_rank_shares_the_pass_of_other_evaluators(tmp_path):
    log = []
    options = dict(
        knn=dict(k=1, temperature=0.07, pools=("cls",)), rank=dict(max_images=10**6)
    )
    evaluation = evaluation_of(
        *images_of(40), tmp_path, log=log, predict=encode, rows=VIEWS,
        wanted=wanted(options),
    )
    for each in evals.make(options).values():
        each.run(evaluation)
    assert sorted(log) == [("eval", None), ("train", None)]


def test_one_pool_and_one_k_are_reported_as_one_number(tmp_path):
    evaluation = evaluation_of(*images_of(40), tmp_path, predict=encode, rows=VIEWS)
    for k in (1, (1,)):
        result = run("knn", evaluation, k=k, temperature=0.07, pools=("cls",))
        assert result.metrics == {"top1": 1.0}


def test_a_pool_that_the_model_does_not_have_is_an_error(tmp_path):
    evaluation = evaluation_of(*images_of(40), tmp_path)
    with pytest.raises(ValueError, match="No output class_token .* has features"):
        run("knn", evaluation, k=1, temperature=0.1, pools=("cls",))


def errors_of(found):
    """Returns the metrics without the ratio of signal and noise, which has tests."""
    assert any(name.startswith("psnr") for name in found)
    return {name: v for name, v in found.items() if not name.startswith("psnr")}


@pytest.mark.parametrize(
    "splits, shown", [(("train", "eval"), "eval"), (("train",), "train")]
)
def test_reconstruction_writes_a_panel_and_ignores_the_padding(
    tmp_path, splits, shown
):
    log = []
    evaluation = evaluation_of(*images_of(30), tmp_path, splits=splits, log=log)
    result = run("reconstruction", evaluation, every_epochs=10.0, num_images=5)
    assert log == [(shown, 5)]
    assert errors_of(result.metrics) == {"mse": np.mean(np.arange(5))}
    assert result.pictures == (tmp_path / "panels" / "step_00000007.png",)
    assert result.pictures[0].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("thrown", [(4,), (1, 3, 4)])
def test_errors_of_thrown_and_decoded_patches_are_told_apart(tmp_path, thrown):
    evaluation = evaluation_of(*images_of(30), tmp_path, thrown=thrown)
    found = run("reconstruction", evaluation, num_images=5).metrics
    found = errors_of(found)
    sample = np.mean(np.arange(5))
    assert found == pytest.approx({
        "mse": sample + 100 * len(thrown) / 4,
        "mse_retained": sample,
        "mse_thrown": sample + 100,
    }, rel=F64_RTOL)


def test_the_panel_shows_8_images_and_the_error_is_that_of_all(tmp_path):
    images, labels = images_of(30)
    evaluation = evaluation_of(images, labels, tmp_path, thrown=(2,))
    result = run("reconstruction", evaluation, num_images=19)
    assert result.metrics["mse_retained"] == np.mean(np.arange(19))
    eight = next(batches(images, labels, 8))
    expected = visualize.reconstruction_panel(
        jax.device_get(reconstruct(eight, np.arange(5) == 2)),
        tmp_path / "expected.png", caption="made by hand",
    )
    assert result.pictures[0].read_bytes() == expected.read_bytes()


KNN = dict(every_epochs=0.0, k=20, temperature=0.07)
LINEAR = dict(every_epochs=0.0)
RANK = dict(every_epochs=0.0, max_images=100)
PANELS = dict(every_epochs=0.0, num_images=8)
ACCURACY = dict(every_epochs=0.0)
# Of a model that can do everything, on labelled images.
ABOUT = evaluator.About(
    num_images={"train": 100, "eval": 20}, num_classes=10,
    outputs=frozenset({"features", "class_token", "logits", "reconstruction"}),
)


def check(options, **changes):
    """Checks evaluators before the training, with something else of `ABOUT`."""
    evaluator.check(evals.make(options), ABOUT._replace(**changes))


def test_every_evaluator_is_one_and_its_options_cannot_change():
    options = dict(
        accuracy=ACCURACY, knn=KNN, linear=LINEAR, rank=RANK, reconstruction=PANELS
    )
    made = evals.make(options)
    assert set(made) == set(evals.EVALUATORS)
    for each in made.values():
        assert isinstance(each, evaluator.Evaluator)
        assert dataclasses.is_dataclass(each) and each.__dataclass_params__.frozen
    assert made["knn"] == knn.KNN(k=20, temperature=0.07)


def test_what_can_be_evaluated_passes_the_check():
    check(dict(
        accuracy=ACCURACY, knn=KNN, linear=LINEAR, rank=RANK, reconstruction=PANELS
    ))
    unlabelled = dict(rank=RANK, reconstruction=PANELS)
    check(unlabelled, num_images={"train": 100}, num_classes=0)
    optional = dict(max_train_images=None, l2s=(0.1,), max_iterations=9, tolerance=0.1)
    check(dict(linear=optional))


@pytest.mark.parametrize("options, message", [
    (dict(knm=KNN), "Unknown evaluator 'knm' in config.evals. Known: accuracy, knn"),
    (dict(knn=KNN | dict(temprature=1)),
     r"Unknown option 'temprature' in config.evals.knn. Known: every_epochs, k, "
     r"max_train_images, pools, temperature; correct it or take it out\."),
    (dict(linear=LINEAR | dict(k=5)), "Unknown option 'k' in config.evals.linear. "
     "Known: every_epochs, l2s, max_iterations, max_train_images, tolerance;"),
    (dict(reconstruction=PANELS | dict(rows=8)),
     "Unknown option 'rows' in config.evals.reconstruction. Known: every_epochs, n"),
    (dict(rank=RANK | dict(images=5)), "Unknown option 'images' in config.evals.rank."),
    (dict(rank=RANK | dict(max_images=1)),
     "evals.rank of 1 images, with max_images=1 of 20; .* needs 2 or more"),
    (dict(knn=dict(k=5)), "config.evals.knn lacks the option 'temperature', which has"),
    (dict(reconstruction={}), "config.evals.reconstruction lacks the option 'num_imag"),
    (dict(knn=KNN | dict(k=101)),
     r"evals.knn.k=101 neighbours of 100 training images; choose 1 <= k <= 100\."),
    (dict(knn=KNN | dict(k=0)), "evals.knn.k=0 neighbours of 100 training images"),
    (dict(knn=KNN | dict(k=51, max_train_images=50)),
     "choose 1 <= k <= 50, or raise max_train_images=50"),
    (dict(knn=KNN | dict(k=101, max_train_images=128)), r"choose 1 <= k <= 100\."),
    (dict(knn=KNN | dict(k=(20, 200, 10))), "evals.knn.k=200 neighbours of 100 train"),
    (dict(knn=KNN | dict(k=(20, 20))), r"k=\(20, 20\); give a whole number of neigh"),
    (dict(knn=KNN | dict(k=2.5)), "k=2.5; give a whole number of neighbours"),
    (dict(knn=KNN | dict(pools=("mean", "max"))),
     r"evals.knn.pools=\('mean', 'max'\); give one or several .* of mean, cls\."),
    (dict(knn=KNN | dict(pools=())), r"evals.knn.pools=\(\); give one"),
    (dict(knn=KNN | dict(pools=("cls", "cls"))), "give one or several different"),
])
def test_evaluations_that_cannot_be_made_are_refused_before_the_training(
    options, message
):
    with pytest.raises(ValueError, match=message):
        check(options)


def test_classifiers_need_labels_and_images_to_test_on():
    with pytest.raises(ValueError, match="evals.linear needs labels"):
        check(dict(linear=LINEAR), num_classes=0)
    with pytest.raises(ValueError, match="no evaluation split. Set data.eval_split"):
        check(dict(knn=KNN), num_images={"train": 100})


@pytest.mark.parametrize("options, lacking", [
    (dict(accuracy=ACCURACY), "logits"),
    (dict(reconstruction=PANELS), "reconstruction"),
    (dict(knn=KNN | dict(pools=("mean", "cls"))), "class_token"),
    (dict(rank=RANK), ""),
])
def test_evaluators_need_the_outputs_that_they_look_at(options, lacking):
    (name,), outputs = options, frozenset({"features", "segmentation"})
    if not lacking:
        check(options, outputs=outputs)
        return
    with pytest.raises(ValueError, match=(
        f"evals.{name} needs the output {lacking}, but config.objective gives "
        f"features, segmentation; take {name} out"
    )):
        check(options, outputs=outputs)


def test_the_class_token_is_not_called_the_mean_of_patches():
    check(dict(knn=KNN | dict(pools=("cls",))), pool="cls")
    check(dict(linear=LINEAR), pool="cls")
    with pytest.raises(ValueError, match=r"set evals.knn.pools=\('cls',\)"):
        check(dict(knn=KNN | dict(pools=("mean", "cls"))), pool="cls")


def test_few_images_for_panels_are_no_features_of_the_same_pass(tmp_path):
    """The rank looks at as many images as the panel; it needs no pictures of them."""
    options = dict(rank=dict(max_images=5), reconstruction=dict(num_images=5))
    evaluation = evaluation_of(
        *images_of(30), tmp_path, predict=encode, rows=VIEWS, wanted=wanted(options)
    )
    for each in evals.make(options).values():
        each.run(evaluation)
    assert set(evaluation._extracted) == {("eval", 5, "features")}
