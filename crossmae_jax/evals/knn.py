"""Weighted k-nearest-neighbour classification of frozen features.

    score(c) = sum over the k most similar train images i with label c of
               exp(cos(x, x_i) / temperature)

The protocol of instance discrimination (arXiv 1805.01978) and DINO (arXiv 2104.14294):
cosine similarity, k = 10, 20, 100 and 200 with 20 the usual one, temperature = 0.07.
Nothing is trained, so it is quick and has nothing to tune, and it punishes features
whose classes are not compact.

The search is exact. Train and test features stay on the host; one block of the train
set at a time goes to the device, where a running list of the k best is merged with it.
No matrix of all pairs exists, and no copy of the train set: at 1.28 million train
images of width 768 the device holds the test features, two blocks of train features and
one tile of similarities. It runs on one device; where there are several processes each
computes the same numbers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from crossmae_jax import errors, ranges
from crossmae_jax.evals import evaluator, features
from crossmae_jax.evals.evaluator import About, Evaluation, Result, Wanted

# What images are compared by -> which output of the objective that is.
_POOLS = {"mean": "features", "cls": "class_token"}
# Below this many classes five guesses are right too often to say anything.
_TOP5_CLASSES = 20
# A tile of 16 MiB; wide, because beside the product it is choosing the best of each
# tile that costs.
_QUERY_BLOCK = 128
_BANK_BLOCK = 32768
_GROUP = 2**16  # queries on the device: 200 MB at width 768


@dataclasses.dataclass(frozen=True)
class KNN:
    """The evaluator: the evaluation split by its neighbours in the training split.

    Attributes:
      k: how many neighbours vote: a number, or several of one search.
      temperature: of the votes.
      pools: what images are compared by: "mean" of the patch tokens, "cls", the class
        token, or both.
      max_train_images: so many training images are searched, evenly spread; None: all.
    """

    k: Any  # int | Sequence[int]; `numbers` refuses the rest in the user's words
    temperature: float
    pools: Sequence[str] = ("mean",)
    max_train_images: int | None = None

    def __post_init__(self):
        numbers(self.k)
        ranges.check("evals.knn.temperature", self.temperature, above=0)
        evaluator.check_limit("knn", "max_train_images", self.max_train_images)
        pools = self.pools
        if not pools or len(set(pools)) < len(pools) or not set(pools) <= set(_POOLS):
            raise ValueError(
                f"config.evals.knn.pools={pools!r}; give one or several different ones "
                f"of {', '.join(_POOLS)}."
            )

    def wanted(self) -> tuple[Wanted, ...]:
        return tuple(
            Wanted(split, limit, _POOLS[pool]) for pool in self.pools
            for split, limit in (("train", self.max_train_images), ("eval", None))
        )

    def check(self, about: About) -> None:
        evaluator.check_labels("knn", about)
        num_train, limit = about.num_images["train"], self.max_train_images
        bank = num_train if limit is None else min(limit, num_train)
        more = f", or raise max_train_images={limit}" if bank < num_train else ""
        for k in numbers(self.k):
            if not 1 <= k <= bank:
                raise ValueError(
                    f"config.evals.knn.k={k} neighbours of {bank} training images; "
                    f"choose 1 <= k <= {bank}{more}."
                )
        if about.pool == "cls" and "mean" in self.pools:
            raise ValueError(
                f"k-NN with pools={self.pools} of a classifier with model.pool='cls': "
                "what it pools is the class token alone; set evals.knn.pools=('cls',)."
            )

    def run(self, evaluation: Evaluation) -> Result:
        """Returns "top1" and, of enough classes, "top5".

        Several k or pools have names of their own, "mean/k20/top1"; the first is
        "top1", too.
        """
        ks, metrics = numbers(self.k), {}
        for pool in self.pools:
            train, test = (
                evaluation.labelled(split, limit, output=_POOLS[pool])
                for split, limit in (("train", self.max_train_images), ("eval", None))
            )
            if max(ks) > len(train.values):
                raise errors.SetupError(
                    f"config.evals.knn.k={max(ks)} neighbours, but only "
                    f"{len(train.values)} of the training images have a label; choose "
                    f"k <= {len(train.values)}, or label more of them."
                )
            shares = evaluate(train, test, k=ks, temperature=self.temperature)
            metrics |= {f"{pool}/{name}": share for name, share in shares.items()}
        first = f"{self.pools[0]}/k{ks[0]}/"
        plain = {
            name.removeprefix(first): share for name, share in metrics.items()
            if name.startswith(first)
        }
        several = len(ks) > 1 or len(self.pools) > 1
        return Result(plain | metrics if several else plain)


def evaluate(
    train: features.Features,
    test: features.Features,
    *,
    k: int | Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Returns the share of test images classified correctly.

    One number of neighbours gives "top1"; several give "k10/top1", "k20/top1", ... of
    one search. "top5" comes along where there are 20 classes or more. A class without a
    vote is never a hit; equal votes go to the lower class number.

    Raises:
      ValueError: for unlabelled or mismatched features, or a k or temperature that
        cannot be used.
    """
    num_classes = features.check_labelled(train, test)
    ks = numbers(k)
    for count in ks:
        if not 1 <= count <= len(train.values):
            raise ValueError(
                f"k={count} neighbours of {len(train.values)} train images; "
                f"choose 1 <= k <= {len(train.values)}."
            )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; choose a positive number.")
    similarity, index = neighbours(train.values, test.values, k=max(ks))
    labels, metrics = train.labels[index], {}
    for count in ks:
        rank = _rank_of_truth(
            similarity[:, :count], labels[:, :count], test.labels,
            num_classes=num_classes, temperature=temperature,
        )
        prefix = "" if k == count else f"k{count}/"
        metrics[f"{prefix}top1"] = float(np.mean(rank < 1))
        if num_classes >= _TOP5_CLASSES:
            metrics[f"{prefix}top5"] = float(np.mean(rank < 5))
    return metrics


def numbers(k: Any) -> tuple[int, ...]:
    """Returns the numbers of neighbours of an option as a tuple.

    Raises:
      ValueError: unless k is a whole number or several different ones.
    """
    ks = tuple(k) if isinstance(k, Sequence) else (k,)
    if not ks or len(set(ks)) < len(ks) or not all(type(n) is int for n in ks):
        raise ValueError(
            f"k={k!r}; give a whole number of neighbours, or several different ones."
        )
    return ks


def neighbours(
    bank: Float[np.ndarray, "m d"],
    queries: Float[np.ndarray, "n d"],
    *,
    k: int,
    query_block: int = _QUERY_BLOCK,
    bank_block: int = _BANK_BLOCK,
    group: int = _GROUP,
) -> tuple[Float[np.ndarray, "n {k}"], Int[np.ndarray, "n {k}"]]:
    """Finds the k rows of `bank` most similar to each of `queries`.

    Args:
      query_block: rows of a tile of similarities; likewise `bank_block` its columns.
      group: how many queries lie on the device at a time; the bank passes once for
        each group.

    Returns:
      Cosine similarities, best first, and row numbers. Of equally similar rows the
      lower number comes first.
    """
    num_queries = len(queries)
    query_block = min(query_block, num_queries)
    bank_block = min(max(bank_block, k), len(bank))
    group = max(group // query_block, 1) * query_block

    similarity = np.empty((num_queries, k), np.float32)
    index = np.empty((num_queries, k), np.int32)
    for first in range(0, num_queries, group):
        rows = slice(first, first + group)
        best = _search(bank, queries[rows], k, query_block, bank_block)
        for whole, blocks in zip((similarity, index), best):
            whole[rows] = np.asarray(blocks).reshape(-1, k)[: len(whole[rows])]
    return similarity, index


def _search(bank, queries, k, query_block, bank_block):
    """Passes the bank over queries on the device; returns their k best, in blocks."""
    placed = _unit_rows(jnp.stack([
        _padded(queries, start, query_block)
        for start in range(0, len(queries), query_block)
    ]))
    best = (
        jnp.full((*placed.shape[:2], k), -jnp.inf),
        jnp.zeros((*placed.shape[:2], k), jnp.int32),
    )
    # Two blocks exist at a time, one on its way and one at work, always in the same
    # memory.
    stages = [_aligned(bank_block, bank.shape[1]) for _ in range(2)]
    for i, start in enumerate(range(0, len(bank), bank_block)):
        stage, rows = stages[i % 2], bank[start : start + bank_block]
        stage[: len(rows)] = rows  # the rows behind are masked by number
        block = jnp.asarray(stage)
        # Before the next but one overwrites this stage. Unasked, the host would put all
        # blocks in the queue.
        jax.block_until_ready(best)
        best = _merge_block(best, placed, block, start, len(bank))
    return jax.block_until_ready(best)


def _aligned(rows: int, width: int) -> np.ndarray:
    """Returns zeros that start where XLA reads an array without copying it on a CPU."""
    values = np.zeros(rows * width + 16, np.float32)
    offset = -values.ctypes.data % 64 // 4
    return values[offset : offset + rows * width].reshape(rows, width)


@functools.partial(jax.jit, donate_argnums=0)
def _merge_block(best, queries, block, start, num_bank):
    """Merges one block of the bank into the k best of every query."""
    length = _length(block)[:, 0]  # divides the tile: no second block beside this one
    index = start + jnp.arange(block.shape[0], dtype=jnp.int32)

    def merge(arguments):
        (similarity, nearest), queries = arguments
        tile = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
        tile = jnp.where(index[None] < num_bank, tile / length[None], -jnp.inf)
        k = similarity.shape[1]
        tile, column = jax.lax.top_k(tile, k)
        # Earlier blocks first: `top_k` keeps the first of equals, hence the lower row.
        similarity = jnp.concatenate([similarity, tile], axis=1)
        nearest = jnp.concatenate([nearest, index[column]], axis=1)
        similarity, column = jax.lax.top_k(similarity, k)
        return similarity, jnp.take_along_axis(nearest, column, axis=1)

    return jax.lax.map(merge, (best, queries))


@jax.jit
def _unit_rows(values):
    """Divides rows by their length; a row of zeros stays, similar to nothing."""
    return values / _length(values)


def _length(values):
    return jnp.maximum(jnp.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def _padded(values: np.ndarray, start: int, size: int) -> jax.Array:
    """Returns so many rows on the device, with rows of zeros behind the last one."""
    rows = values[start : start + size]
    if len(rows) < size:
        rows = np.pad(rows, ((0, size - len(rows)), (0, 0)))
    return jnp.asarray(rows)


def _rank_of_truth(similarity, labels, truth, *, num_classes, temperature):
    """Counts the classes with more votes than the true one; all if it has no vote."""
    ranks = []
    # In blocks, because a row is as long as there are classes.
    for start in range(0, len(truth), _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        # float64 sums on the host: the same order of additions, hence the same answer,
        # on every device.
        best = similarity[rows].astype(np.float64)
        # Measured from the nearest, whose weight is 1: no temperature overflows.
        weights = np.exp((best - best[:, :1]) / temperature)
        cell = np.arange(len(best))[:, None] * num_classes + labels[rows]
        votes = np.bincount(
            cell.ravel(), weights=weights.ravel(), minlength=len(best) * num_classes
        ).reshape(-1, num_classes)

        known = truth[rows] < num_classes
        label = np.where(known, truth[rows], 0)[:, None]
        own = np.take_along_axis(votes, label, axis=1)
        earlier = np.arange(num_classes) < label
        rank = np.sum((votes > own) | ((votes == own) & earlier), axis=1)
        ranks.append(np.where(known & (own[:, 0] > 0), rank, num_classes))
    return np.concatenate(ranks)
