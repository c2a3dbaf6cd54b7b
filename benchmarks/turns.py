"""Training steps in processes of their own, which take turns.

A step of this library and one of another cannot share a process fairly: their threads
fight for the cores and their allocators for the device's memory. Here each is made in a
process of its own and then waits on a pipe until it is its turn. What slows the machine
down slows all of them, and a ratio is the median of the ratios of neighbouring steps.

All of them import and trace at once; then they compile one after the other, as on a GPU
XLA chooses its kernels by timing them, and another that compiles would spoil that.

A process that runs out of memory, or ends for any other reason, is told by its last
words and leaves the others alone.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from benchmarks import step as our_step


class Fallen(RuntimeError):
    """A process that was to take turns has ended."""


class Player:
    """A training step in another process.

    Attributes:
      facts: what the process said about itself when its step was ready; empty before.
      seconds: of each step; likewise `cpu_seconds`, of all threads, which other
        programs on the machine change less.
      peak_bytes: the most memory that the process has used.
      fallen: why the process takes no more turns; empty while it does.
    """

    def __init__(self, name: str, command: list[str]):
        self.name, self.facts = name, {}
        self.seconds, self.cpu_seconds = [], []
        self.peak_bytes, self.fallen = 0, ""
        self._has_traced, self._begin = False, time.perf_counter()
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def traced(self) -> None:
        """Waits until it has traced its step, or has fallen."""
        if not self._has_traced:
            self._hear()
            self._has_traced = True

    def ready(self) -> None:
        """Lets it compile and waits until its step is ready, or it has fallen."""
        self.traced()
        self.facts = self._ask("compile")
        passed = time.perf_counter() - self._begin
        print(
            f"{self.name}: {self.fallen or 'ready'} after {passed:.0f} s",
            file=sys.stderr, flush=True,
        )

    def step(self) -> None:
        """Runs one step there and notes its time; does nothing once it has fallen."""
        reply = self._ask("step")
        if reply:
            self.seconds.append(reply["seconds"])
            self.cpu_seconds.append(reply["cpu_seconds"])
            self.peak_bytes = reply["peak_bytes"]

    def close(self) -> None:
        """Ends the process, which gives its memory back."""
        if self._process.stdin.closed:
            return
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, what: str) -> dict[str, Any]:
        """Returns the answer to a request, nothing if it has ended."""
        if self.fallen:
            return {}
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said last is still to be read
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        """Returns what the process says next, nothing if it has ended."""
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {}
        if not line:
            self.fallen = f"ended with status {self._process.wait()}"
        elif "error" in reply:
            self.fallen = reply["error"]
        return {} if self.fallen else reply


def ratio(times: list[float], others: list[float]) -> float:
    """Returns how long steps take in steps of another player, pair by pair."""
    return statistics.median(x / y for x, y in zip(times, others, strict=True))


def measure(players: Iterable[Player], *, num_steps: int) -> None:
    """Lets the players take turns, a step each, `num_steps` times.

    Their times are of these steps; earlier ones are forgotten.
    """
    players = list(players)
    for player in players:
        player.seconds, player.cpu_seconds = [], []
    for _ in range(num_steps):
        for player in players:
            player.step()


def measured(players: Sequence[Player], *, num_steps: int) -> Iterator[Player]:
    """Yields each player as soon as its times are known: those that it is asked for.

    The first takes its steps alone, each other one in turns with the first; so a row of
    a table is there before the next player has compiled. Nothing is timed while one of
    them still traces.

    Raises:
      ValueError: if they run on different kinds of devices.
    """
    for player in players:
        player.ready()
        together = list(dict.fromkeys([players[0], player]))
        platforms = {p.name: p.facts["platform"] for p in together if p.facts}
        if len(set(platforms.values())) > 1:
            raise ValueError(
                f"The steps would run on different devices, {platforms}; install JAX "
                "and PyTorch for the same one."
            )
        for other in players:
            other.traced()
        if not player.fallen:
            measure(together, num_steps=num_steps)
        yield player


Made = tuple[Callable[[], None], dict[str, Any]]  # a step, and facts about it


def serve(
    prepare: Callable[[], Callable[[], Made]], peak_bytes: Callable[[], int]
) -> None:
    """Traces a step, compiles it when a line arrives, runs it whenever another does.

    Everything that libraries print goes to the standard error output; the standard
    output is the pipe.

    Args:
      prepare: traces, and returns what compiles: that returns the step, which waits for
        its results, and facts about it.
      peak_bytes: returns the most memory that the process has used so far.
    """
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**what):
        pipe.write(json.dumps(what) + "\n")
        pipe.flush()

    def last_words(kind, error, traceback):
        lines = str(error).strip().splitlines() or [""]
        say(error=f"{kind.__name__}: {lines[0]}")
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = last_words
    make = prepare()
    say(traced=True)
    if not sys.stdin.readline():
        return
    step, facts = make()
    say(**facts)
    for _ in sys.stdin:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        step()
        say(
            seconds=time.perf_counter() - begin,
            cpu_seconds=time.process_time() - cpu_begin, peak_bytes=peak_bytes(),
        )


def peak_host_bytes() -> int:
    """Returns the most memory that this process has had."""
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def our_player(name: str, path: str, overrides: list[str]) -> Player:
    """Starts a process with our training step of a configuration."""
    command = [sys.executable, "-m", "benchmarks.turns", f"--config={path}"]
    return Player(name, command + [f"--override={override}" for override in overrides])


def main(argv: list[str] | None = None) -> None:
    """Is such a process, with our training step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns")
    parser.add_argument("--config", required=True)
    parser.add_argument("--override", action="append", default=[])
    args = parser.parse_args(argv)

    def prepare():
        config = our_step.load_config(args.config, overrides=args.override)
        compile_and_run = our_step.trace(args.config, config)

        def make():
            run, device = compile_and_run(), jax.local_devices()[0]
            return run.step, {
                "platform": device.platform,
                "device": device.device_kind,
                "compile_seconds": run.compile_seconds,
            }

        return make

    def peak_bytes():
        used = jax.local_devices()[0].memory_stats()  # None on a CPU
        return used["peak_bytes_in_use"] if used else peak_host_bytes()

    serve(prepare, peak_bytes)


if __name__ == "__main__":
    main()
