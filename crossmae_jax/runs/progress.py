"""How far a run is, for whoever looks on; only process 0 shows it.

Where nobody can look any more, as in a terminal that was closed, the run goes on
without a word, to its checkpoint at least (`distributed.preemption`).
"""

import contextlib
import io
import sys
import time
from collections.abc import Callable

import jax
from tqdm import tqdm


class Progress:
    """One bar over all steps; in a log file a plain line every few seconds instead.

    Example:
      progress = Progress(total_steps, first_step=step)
      progress.update(step, loss=0.71, images_per_second=2310, data_wait=0.02)
      progress.note("k-NN top-1 0.93")
      progress.close()
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        file: io.TextIOBase | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._file = sys.stderr if file is None else file
        self._active = jax.process_index() == 0
        self._total, self._step = total_steps, first_step
        self._every, self._clock = every_seconds, clock
        self._begin: tuple[int, float] | None = None  # after the first, compiling step
        self._values: dict[str, str] = {}
        self._shown: tuple[int, float] | None = None
        self._bar = None
        if self._active and self._file.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, file=self._file, miniters=1,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{desc}",
            )

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        images_per_second: float | None = None,
        data_wait: float | None = None,
    ) -> None:
        """Moves to a step; a value that is not given is shown as it was."""
        if not self._active:
            return
        self._step, now = step, self._clock()
        if self._begin is None:
            self._begin = (step, now)
        if loss is not None:
            self._values["loss"] = f"  loss {loss:.4f}"
        if images_per_second is not None:
            self._values["speed"] = f"  {images_per_second:.0f} images/s"
        if data_wait is not None:
            self._values["wait"] = f"  data wait {data_wait:.0%}"
        done, seconds = step - self._begin[0], now - self._begin[1]
        if done > 0:
            left = seconds / done * (self._total - step)
            self._values["left"] = f"  left {tqdm.format_interval(left)}"
        if self._bar is not None:
            self._bar.set_description_str(self._text(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._shown is None or now - self._shown[1] >= self._every:
            self._show_line(now)

    def _text(self) -> str:
        order = ("loss", "speed", "wait", "left")
        return "".join(self._values.get(name, "") for name in order)

    def _show_line(self, now: float) -> None:
        share = f"{self._step / max(self._total, 1):4.0%}"
        with contextlib.suppress(OSError):
            print(f"{share}  step {self._step}/{self._total}{self._text()}",
                  file=self._file, flush=True)
        self._shown = (self._step, now)

    def note(self, text: str) -> None:
        """Prints a line of text without breaking the bar."""
        if not self._active:
            return
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(text, file=self._file)
            else:
                print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Shows where the run stands, a last time."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        elif self._shown is not None and self._shown[0] != self._step:
            self._show_line(self._clock())
