"""What a run writes and shows while it trains, and where its seconds went.

One clock: `walltime` books every second, and speed is read off its sums, so that the
images per second of the log and the goodput of the run cannot contradict each other.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from crossmae_jax import errors
from crossmae_jax.distributed import programs
from crossmae_jax.runs import metrics, skips, walltime
from crossmae_jax.runs.progress import Progress
from crossmae_jax.runs.watchdog import Watchdog

_SHOWN = ("images_per_second", "data_wait")  # beside the loss, on the bar
_SAID = 10  # skipped steps that have a line each; then every so many have one


class NotFinite(errors.UserError, FloatingPointError):
    """Loss or gradient were not finite in so many steps in a row that a run ends."""


@runtime_checkable
class Loader(Protocol):
    """What the journal asks of the batches that a run trains on."""

    wait_seconds: float  # that the loop has waited for a batch, since the launch

    @property
    def num_bad(self) -> int:
        """How many images were replaced, over all launches."""


class Journal:
    """The log of one launch: metrics.jsonl, TensorBoard, the bar, time.json.

    All processes of a run call every method; process 0 writes.

    Attributes:
      latest: the newest value of every metric; of training also that of a launch
        before, since one that finds the run finished makes no step.

    Example:
      with Journal(directory, total=300, ...) as journal:
          batch = next(journal.reading(loader))
          state, logged = step(state, batch)
          journal.stepped(1, logged, log=True)
          with journal.spent("save"):
              checkpoints.save(1, state)
          journal.saved()
          journal.write(1, {"eval/knn/top1": 0.5})
          journal.finish()

    Args:
      total: steps of the whole run.
      first_step: the step that the launch goes on from.
      resumed: whether there were launches before, with a checkpoint.
      begun: when the launch began, seconds of the epoch.
      max_skipped_in_a_row: after so many skipped steps the run ends.
      watch: is told what the run does, and that it does something.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total: int,
        first_step: int,
        resumed: bool,
        begun: float,
        images_per_step: int,
        steps_per_epoch: float,
        max_skipped_in_a_row: int,
        watch: Watchdog | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._loader: Loader | None = None
        self._waited, self._first = 0.0, first_step
        self._watch = watch or Watchdog()
        self._images_per_step = images_per_step
        self._steps_per_epoch = steps_per_epoch
        self._writer = metrics.MetricWriter(
            directory, resume_step=first_step if resumed else None
        )
        self._progress = Progress(total, first_step=first_step)
        self._time = walltime.WallTime(
            directory, begun=begun, resuming=resumed,
            waited=self._waited_in_all, clock=clock,
        )
        self._step = first_step
        self._skips, self._max_skipped = skips.Skips(), max_skipped_in_a_row
        self._logged: Mapping[str, Any] = {}
        self._programs, self._open = programs.Record(), contextlib.ExitStack()
        self._make_step: programs.Once | None = None
        self._step_made, self._compiling = None, True
        self.latest: dict[str, float] = dict(self._writer.latest)
        self._time.until_now("start")
        self._watch.started(first_step)
        self._mark()

    def __enter__(self) -> "Journal":
        self._open.enter_context(self._programs.listening())
        return self

    def __exit__(self, *_: Any) -> None:
        self._watch.enter("end")
        self._open.close()
        self._progress.close()
        self._writer.close()

    def reading(self, loader: Loader) -> Iterator[Any]:
        """Returns the batches that come from here from now on."""
        self._waited, self._loader = self._waited_in_all(), loader
        return self._watch.awaiting(loader)

    def _waited_in_all(self) -> float:
        return self._waited + (self._loader.wait_seconds if self._loader else 0.0)

    def compiled_once(self, step: Callable) -> Callable:
        """Returns a step that is said to be compiled again, should that happen.

        Its first call counts as compiling, unless it is the step of before.
        """
        if step is not self._step_made:
            self._step_made, self._compiling = step, True
            self._make_step = programs.Once(
                step, ("state", "batch"), self._programs, self.say
            )
        return self._make_step

    def stepped(self, step: int, logged: Mapping[str, Any], *, log: bool) -> None:
        """Takes note of a step; its metrics are fetched and written only if `log`.

        The first step of a launch, and of each kind of step, compiles and counts as
        that.

        Raises:
          NotFinite: if too many steps in a row were skipped; of the last few steps
            that is known only if `log`.
        """
        self._step, self._logged = step, logged
        self._tell(self._skips.stepped(step, logged))
        if self._compiling:
            self._compiling = False
            jax.block_until_ready(logged)
            before = sum(self._time.seconds("compile", "data"))
            self._time.until_now("compile")
            seconds = sum(self._time.seconds("compile", "data")) - before
            compiling = self._make_step.told() if self._make_step else ""
            what = "first step" if step == self._first + 1 else f"step {step}"
            self.say(f"{what}: {seconds:.1f} s{compiling and f'; {compiling}'}")
            self._mark()
        self._watch.stepped(step)
        self._progress.update(step, **(self._log(step) if log else {}))

    def _log(self, step: int) -> dict[str, float]:
        """Writes the last step's metrics and the speed; returns what the bar shows."""
        self._tell(self._skips.look())
        values = {f"train/{name}": float(v) for name, v in self._logged.items()}
        self._time.until_now("steps")
        self._time.write()
        speed = _slowest(self._speed(step))
        values |= {f"train/{name}": value for name, value in speed.items()}
        values |= {
            "train/goodput": self._time.shares()["steps"],
            "train/epoch": step / self._steps_per_epoch,
            "train/bad_images": self._loader.num_bad,
        }
        self.write(step, values)
        shown = {name: speed[name] for name in _SHOWN if name in speed}
        return {"loss": values["train/loss"]} | shown

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a line of metrics, by their whole names."""
        self._writer.write(step, values)
        self.latest |= values

    def evaluated(self, step: int, measured: Mapping[str, float]) -> None:
        """Writes and shows what evaluations measured."""
        if measured:
            self.write(step, measured)
            shown = (f"{name} {value:.4g}" for name, value in measured.items())
            self.say(f"step {step}  " + "  ".join(shown))

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Books the time inside as one kind, see `walltime`."""
        jax.block_until_ready(self._logged)  # steps run ahead on the device
        with self._watch.during(kind), self._time.spent(kind):
            yield

    def saved(self) -> None:
        """Says that a checkpoint holds all steps so far."""
        self._time.saved()
        self._time.write()

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._progress.note(text)

    def finish(self) -> str:
        """Closes the books; returns where the time went, in a line."""
        self._watch.enter("end")
        self._time.write(finished=True)
        return str(self._time)

    def _tell(self, skipped: list[skips.Skipped]) -> None:
        """Says which steps were skipped; ends the run if it were too many in a row."""
        for x in skipped:
            what = f"loss {x.loss:.4g}, length of the gradient {x.grad_norm:.4g}"
            if x.total <= _SAID or x.total % _SAID == 0:
                self.say(
                    f"step {x.step} was skipped and changed no weight: {what}; "
                    f"skipped so far: {x.total}"
                )
            if x.in_a_row >= self._max_skipped:
                raise NotFinite(f"Not finite {x.in_a_row} times in a row: {what}.")

    def _mark(self) -> None:
        """Begins to measure speed."""
        self._marked = (self._step, self._time.seconds("steps", "data"))

    def _speed(self, step: int) -> dict[str, float]:
        """Returns the speed since the last mark; {} if no step was made."""
        before, (steps_then, data_then) = self._marked
        steps_now, data_now = self._time.seconds("steps", "data")
        seconds = steps_now - steps_then + data_now - data_then
        made = step - before
        self._mark()
        if made <= 0 or seconds <= 0:
            return {}
        return {
            "images_per_second": made * self._images_per_step / seconds,
            "step_seconds": seconds / made,
            "data_wait": (data_now - data_then) / seconds,
        }


def _slowest(speed: dict[str, float]) -> dict[str, float]:
    """Returns the speed with the longest wait for data of any host, and which it is.

    All hosts make the same steps, so the one that waits longest holds up all. To be
    called in all processes at once.
    """
    if jax.process_count() == 1 or not speed:
        return speed
    mine = np.float32(speed["data_wait"])
    waits = multihost_utils.process_allgather(mine)
    return speed | {
        "data_wait": float(waits.max()), "data_wait_median": float(np.median(waits)),
        "slowest_host": float(waits.argmax()),
    }
