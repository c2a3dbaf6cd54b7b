"""The benchmark of the search: its data, its own side of it, and what it needs."""

import sys

import numpy as np
import pytest

from benchmarks import knn, turns
from crossmae_jax.evals import knn as evaluator

F32_ATOL = 1e-6


def test_the_bank_is_made_of_unit_vectors_that_do_not_depend_on_its_size():
    bank = knn.bank_of(0, 20_000, 8)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1.0, atol=F32_ATOL)
    np.testing.assert_array_equal(bank[:16384], knn.bank_of(0, 30_000, 8)[:16384])
    np.testing.assert_array_equal(
        bank[16384:], knn.unit_vectors(0, 20_000, 8, first=16384)
    )
    assert len(np.unique(bank[:, 0])) > 19_000  # no block is another one again
    assert not np.array_equal(bank[:5], knn.bank_of(1, 5, 8))


def test_agreement_is_the_share_of_neighbours_that_both_found():
    ours = np.int32([[1, 2, 3], [4, 5, 6]])
    assert knn.agreement(ours, np.int64([[3, 1, 2], [6, 5, 4]])) == 1.0
    assert knn.agreement(ours, np.int64([[1, 2, 9], [7, 8, 4]])) == 0.5


def test_our_side_finds_the_neighbours_and_takes_its_turns(tmp_path):
    found = tmp_path / "ours.npz"
    command = [sys.executable, "-m", "benchmarks.knn", "--player=ours"]
    command += ["--rows=500", "--queries=7", "--width=16", "--k=9", f"--found={found}"]
    with turns.Player("ours", command) as player:
        player.ready()
        turns.measure([player], num_steps=2)
    assert not player.fallen and len(player.seconds) == 2
    assert player.facts["version"].startswith("jax ")
    every = knn.bank_of(1, 7, 16) @ knn.bank_of(0, 500, 16).T
    np.testing.assert_array_equal(
        np.load(found)["index"], np.argsort(-every, axis=1, kind="stable")[:, :9]
    )
    np.testing.assert_allclose(
        np.load(found)["similarity"], -np.sort(-every, axis=1)[:, :9], atol=F32_ATOL
    )
    assert player.peak_bytes > 500 * 16 * 4


def test_without_faiss_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SystemExit, match=r"pip install '\.\[benchmarks\]'"):
        knn.main(["--rows=10", "--queries=2", "--k=1"])


def test_what_is_measured_is_the_search_of_the_evaluator():
    version, search = knn._search_ours(
        knn.parser().parse_args(["--rows=50", "--width=4", "--k=3"])
    )
    bank, queries = knn.bank_of(0, 50, 4), knn.bank_of(1, 5, 4)
    for ours, theirs in zip(search(queries), evaluator.neighbours(bank, queries, k=3)):
        np.testing.assert_array_equal(ours, theirs)
