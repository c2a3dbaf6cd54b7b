"""Where the wall time of a run goes, over all its launches: goodput and the rest.

    steps      training, which is what the time is for; its share is the goodput
    data       waiting for images
    compile    the first step of a launch, and of each kind of step
    evaluate   evaluations
    refresh    attention maps of all images, made anew
    save       what a checkpoint holds the steps up; writing goes on beside them
    start      from the first line of a launch to its first step: restoring, tracing
    restart    what a launch that ended early cost: its steps since the last checkpoint,
               which are made again, and the time until the next launch

`time.json` in the workdir keeps the sums, in seconds, as process 0 sees them: where it
waits for another host, that is in its steps. A run goes on without it: sums that cannot
be read begin anew.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from crossmae_jax import paths
from crossmae_jax.runs import records

FILE = "time.json"
KINDS = ("steps", "data", "compile", "evaluate", "refresh", "save", "start", "restart")


class WallTime:
    """Adds up where the time went; every moment belongs to one kind.

    Example:
      wall_time = WallTime(
          directory, begun=time.time(), resuming=False, waited=lambda: 0.0
      )
      wall_time.until_now("start")
      ...                                 # the first step
      wall_time.until_now("compile")
      ...                                 # steps
      with wall_time.spent("save"):       # what was before went to steps and data
          checkpoints.save(step, state)
      wall_time.saved()
      wall_time.until_now("steps")
      wall_time.write()

    Args:
      begun: when this launch began, by the clock.
      resuming: whether the run goes on, and so do the sums in its directory.
      waited: seconds waited for data since the launch; what is new since the last
        booking counts as "data", whatever is booked.
      clock: seconds since a moment that is the same for all launches.
    """

    def __init__(
        self,
        directory: Path,
        *,
        begun: float,
        resuming: bool,
        waited: Callable[[], float],
        clock: Callable[[], float] = time.time,
    ):
        self._path, self._clock = directory / FILE, clock
        self._wait, self._since, self._waited = waited, begun, 0.0
        self._seconds = dict.fromkeys(KINDS, 0.0)
        noted = None
        if resuming:
            noted = records.recalled(
                self._path, then="where the time goes is added up anew", usable=are_sums
            )
        if noted is not None:
            self._seconds |= noted["seconds"]
            if not noted["finished"]:
                lost = self._seconds["steps"] - noted["saved_steps"]
                self._seconds["steps"] -= lost
                self._seconds["restart"] += lost + max(begun - noted["until"], 0.0)
        self._saved = self._seconds["steps"]

    def until_now(self, kind: str) -> None:
        """Books the time since the last call."""
        now, waited = self._clock(), self._wait()
        new, self._waited = waited - self._waited, max(waited, self._waited)
        new = min(max(new, 0.0), now - self._since)
        self._seconds["data"] += new
        self._seconds[kind] += now - self._since - new
        self._since = now

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Books the time inside as one kind, and what was before it as steps."""
        self.until_now("steps")
        try:
            yield
        finally:
            self.until_now(kind)

    def seconds(self, *kinds: str) -> tuple[float, ...]:
        """Returns the sums of these kinds so far."""
        return tuple(self._seconds[kind] for kind in kinds)

    def shares(self) -> dict[str, float]:
        """Returns the shares of the kinds in all the time so far."""
        total = sum(self._seconds.values())
        return {kind: s / total if total else 0.0 for kind, s in self._seconds.items()}

    def saved(self) -> None:
        """Says that a checkpoint holds all steps that were booked so far."""
        self._saved = self._seconds["steps"]

    def write(self, *, finished: bool = False) -> None:
        """Notes the sums in the workdir, from process 0."""
        if jax.process_index() == 0:
            noted = {
                "seconds": self._seconds, "saved_steps": self._saved,
                "until": self._since, "finished": finished,
            }
            paths.write_whole(self._path, json.dumps(noted, indent=2) + "\n")

    def __str__(self) -> str:
        """Returns `goodput 81% of 512 s: steps 81%, data 2%, compile 9%, ...`."""
        parts = [f"{k} {s:.0%}" for k, s in self.shares().items() if s >= 0.005]
        total = sum(self._seconds.values())
        return f"goodput {self.shares()['steps']:.0%} of {total:.0f} s: " + ", ".join(
            parts
        )


def are_sums(noted: dict[str, Any]) -> bool:
    """Says whether these are sums that `WallTime.write` noted."""
    seconds = noted.get("seconds")
    if not isinstance(seconds, dict) or not isinstance(noted.get("finished"), bool):
        return False
    numbers = (*seconds.values(), noted.get("saved_steps"), noted.get("until"))
    return seconds.keys() <= set(KINDS) and all(map(records.is_number, numbers))
