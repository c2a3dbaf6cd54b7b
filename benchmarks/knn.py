"""Times the exact search of nearest neighbours, and FAISS's flat index beside it.

    python -m benchmarks.knn --rows=128000 --queries=1024

Both search the same random unit vectors for the rows of largest inner product, on all
cores that the process may use, each in a process of its own; they take turns, a search
each. FAISS's index is its own copy of the bank, made before and not timed, and here the
only one that its process holds; ours has no index. The peak is that of the process's
resident memory, interpreter and packages included. Needs `faiss-cpu`.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from benchmarks import step, turns
from crossmae_jax.evals import knn

RESULTS = Path(__file__).parent / "results" / "knn.md"
_BLOCK = 8192
_NAMES = {"ours": "crossmae_jax", "faiss": "FAISS IndexFlatIP"}


def unit_vectors(
    seed: int, rows: int, width: int, *, first: int = 0
) -> Float[np.ndarray, "block width"]:
    """Returns the block of a random bank that starts at a row."""
    random = np.random.default_rng((seed, first))
    values = random.standard_normal((min(_BLOCK, rows - first), width), np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def bank_of(seed: int, rows: int, width: int) -> Float[np.ndarray, "rows width"]:
    """Returns all of a random bank in one array, which alone is ever held whole."""
    bank = np.empty((rows, width), np.float32)
    for first in range(0, rows, _BLOCK):
        bank[first : first + _BLOCK] = unit_vectors(seed, rows, width, first=first)
    return bank


def agreement(
    index: Int[np.ndarray, "n k"], other: Int[np.ndarray, "n k"]
) -> float:
    """Returns the share of neighbours that both found, in whatever order."""
    same = [np.intersect1d(row, others).size for row, others in zip(index, other)]
    return float(np.sum(same) / index.size)


def _search_ours(args: argparse.Namespace):
    bank = bank_of(0, args.rows, args.width)
    version = f"jax {jax.__version__} on {jax.local_devices()[0].platform}"
    return version, lambda queries: knn.neighbours(bank, queries, k=args.k)


def _search_faiss(args: argparse.Namespace):
    import faiss

    index = faiss.IndexFlatIP(args.width)
    for first in range(0, args.rows, _BLOCK):
        index.add(unit_vectors(0, args.rows, args.width, first=first))
    threads = faiss.omp_get_max_threads()
    version = f"faiss {faiss.__version__} with {threads} threads"
    return version, lambda queries: index.search(queries, args.k)


def _play(args: argparse.Namespace) -> None:
    """Is one of the two processes: searches once, keeps what it found, then waits."""

    def prepare():
        prepared = {"ours": _search_ours, "faiss": _search_faiss}[args.player](args)
        version, search = prepared
        queries = bank_of(1, args.queries, args.width)

        def make():
            similarity, index = search(queries)
            np.savez(args.found, similarity=similarity, index=index)
            return lambda: search(queries), {"version": version}

        return make

    turns.serve(prepare, turns.peak_host_bytes)


def compare(args: argparse.Namespace) -> str:
    """Lets both search in turns; returns the table and whether they agree."""
    players, neighbours = [], []
    with tempfile.TemporaryDirectory() as directory:
        for name in _NAMES:
            path = Path(directory) / f"{name}.npz"
            players.append(turns.Player(name, [
                sys.executable, "-m", "benchmarks.knn", f"--player={name}",
                f"--rows={args.rows}", f"--queries={args.queries}", f"--k={args.k}",
                f"--width={args.width}", f"--found={path}",
            ]))
        for player in players:
            player.ready()
        turns.measure(players, num_steps=args.searches)
        for player in players:
            player.close()
            if player.fallen:
                sys.exit(f"{player.name}: {player.fallen}")
            neighbours.append(np.load(Path(directory) / f"{player.name}.npz"))
    bank_bytes = 4 * args.rows * args.width
    lines = [
        step.row([
            "search", "seconds", "CPU seconds", "peak, GB", "peak / bank",
            "time / FAISS",
        ]),
        step.row(["---"] * 6),
    ]
    for player in players:
        low, high = min(player.seconds), max(player.seconds)
        lines.append(step.row([
            f"{_NAMES[player.name]} ({player.facts['version']})",
            f"{statistics.median(player.seconds):.2f} ({low:.2f}..{high:.2f})",
            f"{statistics.median(player.cpu_seconds):.2f}",
            f"{player.peak_bytes / 1e9:.3f}",
            f"{player.peak_bytes / bank_bytes:.2f}",
            f"{turns.ratio(player.seconds, players[1].seconds):.3f}",
        ]))
    ours, theirs = neighbours
    share = agreement(ours["index"], theirs["index"])
    difference = np.abs(ours["similarity"] - theirs["similarity"]).max()
    lines += ["", (
        f"{100 * share:.4f} % of {ours['index'].size} neighbours are the same; the "
        f"similarities in order differ by {difference:.1e} at most."
    )]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.knn", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=128_000, help="of the bank")
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--searches", type=int, default=5, help="of each, in turns (5)")
    parser.add_argument(
        "--write", action="store_true", help=f"append the table to {RESULTS.name}"
    )
    parser.add_argument("--player", choices=_NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measures and prints the table."""
    args = parser().parse_args(argv)
    if args.player:
        _play(args)
        return
    if importlib.util.find_spec("faiss") is None:
        sys.exit(
            "The package faiss is missing; pip install '.[benchmarks]' to search with "
            "it, too."
        )
    load = os.getloadavg()[0]
    text = "\n".join([
        step.conditions(
            [], f"{args.k} neighbours of {args.queries} in {args.rows} x {args.width}"
        ),
        f"One-minute load before: {load:.1f}.", "", compare(args), "",
    ])
    print(text)
    if args.write:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
