"""Erasing and mixing on the device, against timm: by pixel, and by distribution."""

import functools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossmae_jax import augment, losses
from tests.interop import timm, torch

KEY = jax.random.key(0, impl="threefry2x32")
ALPHAS = dict(mixup_alpha=0.8, cutmix_alpha=1.0)
RECIPE = dict(**ALPHAS, cutmix_probability=0.5)
# timm computes shares and sides in double precision.
ATOL = 1e-6


def _images(batch_size=8, height=12, width=20, seed=0):
    shape = (batch_size, height, width, 3)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _torch(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def _numbers(count, start=0):
    return jnp.arange(start, start + count, dtype=jnp.uint32)


def _distance(first, second):
    """Returns the greatest distance of two empirical distributions."""
    first, second = np.sort(first), np.sort(second)
    points = np.concatenate([first, second])
    return np.abs(
        np.searchsorted(first, points, "right") / len(first)
        - np.searchsorted(second, points, "right") / len(second)
    ).max()


def _assert_same_distribution(first, second, name):
    # Kolmogorov-Smirnov at 1e-4: 2.23 = sqrt(-log(0.5e-4) / 2).
    limit = 2.23 * math.sqrt(1 / len(first) + 1 / len(second))
    assert _distance(first, second) < limit, name


# Targets.


def test_targets_are_timms():
    labels = jnp.asarray([0, 6, 3, 2])
    ours = losses.smooth_labels(labels, num_classes=7, smoothing=0.1)
    theirs = timm.data.mixup.mixup_target(
        torch.from_numpy(np.array(labels)), 7, lam=1.0, smoothing=0.1
    )
    np.testing.assert_allclose(ours, theirs, atol=ATOL)
    np.testing.assert_allclose(ours.sum(-1), 1.0, atol=ATOL)
    assert ours[1, 6] == pytest.approx(0.9 + 0.1 / 7)


# Mixing.


def _mix_theirs(images, labels, monkeypatch, *, share, is_cutmix, row, column):
    """Mixes as timm does, with known draws."""
    mixup = timm.data.Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=7
    )
    centre = iter((row, column))
    with monkeypatch.context() as patch:
        patch.setattr(mixup, "_params_per_batch", lambda: (share, is_cutmix))
        patch.setattr("numpy.random.randint", lambda *_, size: next(centre))
        mixed, targets = mixup(_torch(images), torch.from_numpy(np.array(labels)))
    return mixed.permute(0, 2, 3, 1).numpy(), targets.numpy()


@pytest.mark.parametrize("share,is_cutmix,row,column", [
    (0.375, False, 0, 0),
    (0.9, False, 0, 0),
    (0.5, True, 6, 10),  # all of an 8 x 14 box
    (0.3, True, 5, 9),
    (0.6, True, 0, 0),  # a corner
    (0.6, True, 11, 19),
    (0.0, True, 3, 19),  # as large as the image, off its centre
    (1.0, True, 3, 3),  # nothing
    (1.0, False, 0, 0),
    (0.999, True, 3, 3),
])
def test_mixing_is_timms_pixel_for_pixel(monkeypatch, share, is_cutmix, row, column):
    images, labels = _images(), jnp.asarray([0, 1, 2, 3, 4, 5, 6, 0])
    expected = _mix_theirs(
        images, labels, monkeypatch, share=share, is_cutmix=is_cutmix, row=row,
        column=column,
    )
    boxes = augment.cutmix_boxes(
        *(jnp.asarray([x]) for x in (share, row, column)), height=12, width=20
    )
    area = (boxes.bottom - boxes.top) * (boxes.right - boxes.left)
    left = 1 - area / (12 * 20) if is_cutmix else jnp.asarray([share])
    mixing = augment.Mixing(left, jnp.asarray([is_cutmix]), boxes)
    targets = losses.smooth_labels(labels, num_classes=7, smoothing=0.1)
    mixed, mixed_targets = augment.mix(images, targets, mixing)
    if is_cutmix:
        np.testing.assert_array_equal(mixed, expected[0])
    else:
        np.testing.assert_allclose(mixed, expected[0], atol=ATOL)
    np.testing.assert_allclose(mixed_targets, expected[1], atol=ATOL)


def _draw(count, cutmix_probability, **changes):
    settings = dict(height=32, width=48, **ALPHAS) | changes
    return jax.jit(functools.partial(
        augment.draw_mixing, **settings, cutmix_probability=cutmix_probability
    ))(KEY, _numbers(count))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0, 4.0])
def test_mixup_shares_are_distributed_as_timms(alpha):
    count = 20_000
    mixup = timm.data.Mixup(mixup_alpha=alpha, cutmix_alpha=0.0)
    np.random.seed(0)
    theirs = [mixup._params_per_batch()[0] for _ in range(count)]
    ours = _draw(count, 0.0, mixup_alpha=alpha, cutmix_alpha=9.0)
    assert not ours.is_cutmix.any()
    assert 0 <= ours.share.min() and ours.share.max() <= 1
    _assert_same_distribution(ours.share, theirs, "share")
    # The variance of beta(a, a) is 1 / (8 a + 4); four standard deviations are less
    # than 0.0036 of it for a bounded variable.
    variance = np.var(np.asarray(ours.share, np.float64))
    assert abs(variance - 1 / (8 * alpha + 4)) < 0.0036


def test_cutmix_boxes_are_distributed_as_timms():
    count = 8000
    mixup = timm.data.Mixup(mixup_alpha=0.0, cutmix_alpha=1.0)
    np.random.seed(1)
    theirs = [
        timm.data.mixup.cutmix_bbox_and_lam(
            (3, 32, 48), mixup._params_per_batch()[0], correct_lam=True
        ) for _ in range(count)
    ]
    ours = _draw(count, 1.0)
    assert ours.is_cutmix.all()
    _assert_same_distribution(ours.share, [share for _, share in theirs], "share")
    for number, name in enumerate(("top", "bottom", "left", "right")):
        edges = [box[number] for box, _ in theirs]
        _assert_same_distribution(getattr(ours.boxes, name), edges, name)
    heights = ours.boxes.bottom - ours.boxes.top
    _assert_same_distribution(heights, [b - t for (t, b, *_), _ in theirs], "height")
    area = heights * (ours.boxes.right - ours.boxes.left)
    np.testing.assert_allclose(ours.share, 1 - area / (32 * 48), atol=ATOL)


def test_half_of_the_groups_are_cut():
    count = 4000
    found = int(_draw(count, 0.5).is_cutmix.sum())
    assert abs(found - count / 2) < 4 * math.sqrt(count / 4)
    np.random.seed(0)
    mixup = timm.data.Mixup(**ALPHAS, switch_prob=0.5)
    theirs = sum(mixup._params_per_batch()[1] for _ in range(count))
    assert abs(theirs - count / 2) < 4 * math.sqrt(count / 4)


_mixup_cutmix = jax.jit(
    functools.partial(augment.mixup_cutmix, **RECIPE), static_argnames="groups"
)


def _mixed(images, sample, groups, key=KEY):
    targets = losses.smooth_labels(
        jnp.arange(len(images)) % 7, num_classes=7, smoothing=0.1
    )
    return _mixup_cutmix(key, sample, images, targets, groups=groups)


def test_a_group_is_mixed_as_if_it_were_alone():
    images, sample = _images(batch_size=12), _numbers(12, start=40)
    mixed, targets = _mixed(images, sample, groups=3)
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        labels = jnp.arange(12)[rows] % 7
        alone = _mixup_cutmix(
            KEY, sample[rows], images[rows],
            losses.smooth_labels(labels, num_classes=7, smoothing=0.1), groups=1,
        )
        np.testing.assert_array_equal(mixed[rows], alone[0])
        np.testing.assert_array_equal(targets[rows], alone[1])
    np.testing.assert_allclose(targets.sum(-1), 1.0, atol=ATOL)


def test_every_group_draws_for_itself():
    images = jnp.broadcast_to(_images(batch_size=2), (2, 12, 20, 3))
    images = jnp.concatenate([images] * 16)
    _, targets = _mixup_cutmix(
        KEY, _numbers(32), images, jnp.tile(jnp.eye(2), (16, 1)), groups=16
    )
    assert len(set(np.asarray(targets[::2, 0]).tolist())) >= 14
    np.testing.assert_allclose(targets[::2, 0], targets[1::2, 1], atol=ATOL)


def test_a_draw_depends_on_key_and_sample_only():
    images = _images()
    first, second = (_mixed(images, _numbers(8, start=16), 2)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    for other in (
        _mixed(images, _numbers(8, start=24), 2),
        _mixed(images, _numbers(8, start=16), 2, key=jax.random.key(1)),
    ):
        assert not np.array_equal(first, other[0])


@pytest.mark.parametrize("batch_size,groups,multiple", [
    (6, 2, 4), (5, 1, 2), (4, 4, 8), (4, 3, 6), (2, 4, 8), (4, 0, 2)
])
def test_groups_that_cannot_be_paired_say_what_to_choose(batch_size, groups, multiple):
    with pytest.raises(ValueError) as caught:
        _mixed(_images(batch_size=batch_size), _numbers(batch_size), groups)
    message = str(caught.value)
    assert f"A batch of {batch_size} images cannot be cut into {groups} " in message
    assert f"config.optim.accum_steps a multiple of {multiple}, or" in message


# Erasing.


_random_erasing = jax.jit(augment.random_erasing, static_argnames="probability")


def _erase(images, sample, probability=0.25, key=KEY):
    return _random_erasing(key, sample, images, probability=probability)


def _boxes(count, probability, height=32, width=48):
    draw = functools.partial(augment.draw_erasing, height=height, width=width)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, _numbers(count))
    return jax.jit(jax.vmap(functools.partial(draw, probability=probability)))(keys)


@pytest.mark.parametrize("height,width", [(32, 48), (60, 12)])
def test_erased_boxes_are_distributed_as_timms(height, width):
    count = 6000
    erasing = timm.data.random_erasing.RandomErasing(
        probability=1.0, mode="pixel", device="cpu"
    )
    random.seed(0)
    torch.manual_seed(0)
    theirs = []
    for _ in range(count):
        erased = erasing(torch.zeros(1, height, width))[0].numpy() != 0
        rows, columns = (np.flatnonzero(erased.any(axis)) for axis in (1, 0))
        # In a tall image ten tries may fail.
        theirs.append(
            (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows)
            else (0, 0, 0, 0)
        )
    theirs = augment.Boxes(*np.transpose(theirs))
    ours = augment.Boxes(*map(np.asarray, _boxes(count, 1.0, height, width)))
    for name, quantity in {
        "top": lambda box: box.top,
        "bottom": lambda box: box.bottom,
        "left": lambda box: box.left,
        "right": lambda box: box.right,
        "area": lambda box: (box.bottom - box.top) * (box.right - box.left),
        "aspect": lambda box: (box.bottom - box.top) / (box.right - box.left + 1e-9),
    }.items():
        _assert_same_distribution(quantity(ours), quantity(theirs), name)
    assert (ours.bottom - ours.top).max() < height
    assert (ours.right - ours.left).max() < width


def test_a_quarter_of_the_images_is_erased():
    boxes = _boxes(4000, 0.25)
    erased = int((boxes.bottom > boxes.top).sum())
    assert abs(erased - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75)
    assert (_boxes(100, 0.0).bottom == 0).all()


def test_the_box_is_filled_with_noise_and_the_rest_is_left():
    images = _images(batch_size=32, height=32, width=32)
    erased = _erase(images, _numbers(32), probability=1.0)
    changed = np.asarray(erased != images)
    noise = np.asarray(erased)[changed]
    for one in changed:
        rows, columns = (
            np.flatnonzero(one.any(axis)) for axis in ((1, 2), (0, 2))
        )
        box = (rows[-1] + 1 - rows[0]) * (columns[-1] + 1 - columns[0])
        assert one.all(-1).sum() == one.any(-1).sum() == box
        assert 0.01 < box / 32**2 < 0.36
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.size)
    assert len(np.unique(noise)) > 0.99 * noise.size  # images and channels differ


def test_an_image_is_erased_by_its_number_alone():
    images, sample = _images(batch_size=16), _numbers(16, start=5)
    erased = _erase(images, sample, probability=0.5)
    order = np.random.default_rng(0).permutation(16)
    shuffled = _erase(images[order], sample[order], probability=0.5)
    np.testing.assert_array_equal(shuffled, erased[order])
    other = _erase(images, sample, probability=0.5, key=jax.random.key(1))
    assert not np.array_equal(other, erased)


# Both.


def test_augmentations_do_not_depend_on_the_devices():
    def both(sample, images, targets):
        images = _erase(images, sample)
        return _mixup_cutmix(KEY, sample, images, targets, groups=8)

    batch = (_numbers(16), _images(batch_size=16), jnp.eye(16))
    alone = jax.jit(both)(*batch)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.P("data"))
    assert mesh.size == 8
    compiled = jax.jit(both, in_shardings=spread, out_shardings=spread).lower(
        *batch
    ).compile()
    for one, other in zip(alone, compiled(*jax.device_put(batch, spread)), strict=True):
        np.testing.assert_array_equal(one, other)
    # Groups lie whole on the devices, so no pixel has to travel.
    for word in ("all-to-all", "all-gather", "collective-permute", "all-reduce"):
        assert f" {word}" not in compiled.as_text(), word


def test_gradients_pass_by_the_draws():
    images, sample, targets = _images(), _numbers(8), jnp.eye(8)

    def augmented():
        erased = _erase(images, sample, probability=1.0)
        return _mixup_cutmix(KEY, sample, erased, targets, groups=2)

    def loss(weight, mixed, mixed_targets):
        return jnp.sum((mixed.mean((1, 2)) @ weight - mixed_targets) ** 2)

    weight = jnp.ones((3, 8))
    inside = jax.grad(lambda w: loss(w, *augmented()))(weight)
    outside = jax.grad(loss)(weight, *augmented())
    np.testing.assert_array_equal(inside, outside)
    assert np.isfinite(inside).all() and inside.any()
