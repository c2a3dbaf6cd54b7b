"""What can happen to a run: signals in every phase, dead workers, damage on disk.

A fault is a function of a run that trains; when it returns, the run has ended, or goes
on as if nothing had been. It returns what the run did, and raises Unexpected if that is
not what it should have done. Nothing here changes the clock.
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from crossmae_jax.checkpoints import steps
from crossmae_jax.runs import metrics

EVALUATED = 45  # steps between evaluations
SAVED = 75
_REFUSED = 1
_LONGEST = 300  # seconds that a run may take to do what is waited for


class Unexpected(AssertionError):
    """A run did something else than it should."""


class Run:
    """A training process, which can be started again and again.

    Attributes:
      process: the newest; None before the first.
      launches: how often it was started.
      reached: the last step that was logged when a process had ended.
    """

    def __init__(self, config: Path, workdir: Path, images: Path):
        self.workdir, self.images = workdir, images
        self.process: subprocess.Popen | None = None
        self.launches = self.reached = 0
        self._config, self._begin = config, 0
        self._log = workdir.with_suffix(".log")

    def start(self, *, most_bytes: int | None = None) -> None:
        """Starts the run; no file of it may get more than `most_bytes`, if given."""

        def limit():
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's is inherited
            if most_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

        self.launches += 1
        with open(self._log, "ab") as log:
            self._begin = log.tell()
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=limit,
            )

    def command(self) -> list[str]:
        """Returns how the run is started."""
        return [
            sys.executable, "-m", "crossmae_jax.main", f"--config={self._config}",
            f"--workdir={self.workdir}",
        ]

    def said(self) -> str:
        """Returns what the newest process has printed."""
        return self._log.read_bytes()[self._begin:].decode(errors="replace")

    def running(self) -> bool:
        """Says whether it has not ended."""
        return self.process.poll() is None

    def step(self) -> int:
        """Returns the last step that is logged."""
        path = self.workdir / metrics.FILE
        if not path.exists():
            return 0
        return max((row["step"] for row in metrics.rows(path)), default=0)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Returns as soon as it is so, or the run has ended."""
        end = time.monotonic() + _LONGEST
        while self.running() and not condition():
            if time.monotonic() > end:
                raise Unexpected(f"{what} has not come in {_LONGEST} s:\n{self.said()}")
            time.sleep(0.005)

    def ended(self, *statuses: int, saying: str = "") -> str:
        """Waits until it ends with one of these; returns how, in words."""
        try:
            status = self.process.wait(_LONGEST)
        except subprocess.TimeoutExpired:
            raise Unexpected(f"it has not ended in {_LONGEST} s:\n{self.said()}")
        said, self.reached = self.said(), self.step()
        if status not in statuses or not re.search(saying, said):
            raise Unexpected(
                f"it ended with status {status}, expected {statuses} and a line with "
                f"{saying!r}:\n{said[-3000:]}"
            )
        if "Traceback" in said:
            raise Unexpected(f"it ended with a traceback:\n{said[-3000:]}")
        error = re.search(r"^error: .*", said, re.MULTILINE)
        return f"status {status}" + (f", {error[0][:100]}" if error else "")

    def kill(self) -> None:
        """Ends it with all that it started, which leaves it no time for anything."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reached = self.step()

    def workers(self) -> list[int]:
        """Returns its loader processes."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True, text=True, check=False,
        ).stdout.splitlines()
        return [
            int(line.split()[0]) for line in listed
            if "multiprocessing" in line and "resource_tracker" not in line
        ]


Fault = Callable[[Run, random.Random], str]


def _until_phase(run: Run, phase: str) -> None:
    """Waits for a phase of the run, which is started again for those of its start."""
    if phase in ("start", "compile"):
        run.kill()
        run.start()
    if phase == "start":
        run.wait_until(lambda: "images, " in run.said(), "the list of images")
        return
    if phase == "compile":
        run.wait_until(lambda: "attention " in run.said(), "what the step takes")
        return
    run.wait_until(lambda: "first step" in run.said(), "the first step")
    if phase == "save":
        saving = run.workdir / "checkpoints"
        run.wait_until(lambda: bool(steps.unfinished(saving)), "a save")
    elif phase == "evaluate":
        due = (run.step() // EVALUATED + 1) * EVALUATED
        run.wait_until(lambda: run.step() >= due, "an evaluation")
    else:
        before = run.step()
        run.wait_until(lambda: run.step() > before, "a step")


def signalled(number: signal.Signals, phase: str) -> Fault:
    """Returns a signal to the process in a phase of the run."""

    def fault(run: Run, _: random.Random) -> str:
        _until_phase(run, phase)
        if not run.running():
            return "had just ended"
        os.kill(run.process.pid, number)
        if number == signal.SIGKILL:
            did = run.ended(-signal.SIGKILL)
            run.kill()  # its workers
            return did
        # Before there is anything to save, a signal ends a program as any other.
        early = (-number,) if phase == "start" else ()
        return run.ended(SAVED, 0, *early)

    return fault


def stopped(run: Run, rng: random.Random) -> str:
    """Stops the process and its workers for some seconds, as a laptop's lid does."""
    os.killpg(run.process.pid, signal.SIGSTOP)
    time.sleep(rng.uniform(2, 10))
    os.killpg(run.process.pid, signal.SIGCONT)
    _goes_on(run)
    return "went on"


def _goes_on(run: Run) -> None:
    before = run.step()
    run.wait_until(lambda: run.step() > before, "a step after the fault")
    if not run.running() and run.process.returncode:
        raise Unexpected(f"it ended after the fault:\n{run.said()[-3000:]}")


def worker_dies(number: signal.Signals) -> Fault:
    """Returns the death of a loader process by a signal."""

    def fault(run: Run, rng: random.Random) -> str:
        _until_phase(run, "step")
        if not (workers := run.workers()):
            raise Unexpected(f"it has no workers:\n{run.said()}")
        os.kill(rng.choice(workers), number)
        _goes_on(run)
        return "went on with a new worker"

    return fault


def second_start(run: Run, _: random.Random) -> str:
    """The same command, once more, while the run trains."""
    _until_phase(run, "step")
    other = subprocess.run(run.command(), capture_output=True, text=True, check=False)
    if other.returncode != _REFUSED or "in use by" not in other.stderr:
        raise Unexpected(f"a second start was not refused:\n{other.stderr[-3000:]}")
    _goes_on(run)
    return "refused the second, went on"


def disk_full(run: Run, _: random.Random) -> str:
    """No file may grow beyond 200 kB: a save ends as on a disk that is full."""
    run.kill()
    run.start(most_bytes=200_000)
    return run.ended(_REFUSED, saying="error: ")


def _newest(run: Run) -> Path:
    checkpoints = run.workdir / "checkpoints"
    return checkpoints / str(steps.committed(checkpoints)[-1])


def _arrays(step: Path) -> list[Path]:
    files = (path for path in (step / "variables").rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.stat().st_size)


def flipped_byte(run: Run, rng: random.Random) -> str:
    """A bit of the newest checkpoint's weights is another one."""
    path = _arrays(_newest(run))[-1]
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    return _takes_the_one_before(run)


def cut_file(run: Run, _: random.Random) -> str:
    """The newest checkpoint's largest file has lost its second half."""
    path = _arrays(_newest(run))[-1]
    os.truncate(path, path.stat().st_size // 2)
    return _takes_the_one_before(run)


def no_digests(run: Run, _: random.Random) -> str:
    """The newest checkpoint has lost its list of digests."""
    (_newest(run) / "SHA256SUMS").unlink()
    return _takes_the_one_before(run)


def _takes_the_one_before(run: Run) -> str:
    run.start()
    run.wait_until(lambda: "RESUMED" in run.said(), "the step to go on from")
    if "Skipping checkpoint" not in run.said():
        raise Unexpected(f"damage went unnoticed:\n{run.said()}")
    return "named it, went on from the one before"


def cut_metrics(run: Run, _: random.Random) -> str:
    """The last line of metrics.jsonl is half a line."""
    path = run.workdir / metrics.FILE
    os.truncate(path, path.stat().st_size - 20)
    return _resumes(run)


def damaged(name: str) -> Fault:
    """Returns damage to a side file of the run."""

    def fault(run: Run, _: random.Random) -> str:
        (run.workdir / name).write_bytes(b'{"\xff')
        return _resumes(run)

    return fault


def half_a_save(run: Run, _: random.Random) -> str:
    """A save was cut short by the end of the machine."""
    newest = _newest(run)
    half = newest.with_name(f"{int(newest.name) + 1}.orbax-checkpoint-tmp")
    shutil.copytree(newest, half)
    (half / "SHA256SUMS").unlink()
    return _resumes(run)


def _resumes(run: Run) -> str:
    run.start()
    run.wait_until(lambda: "RESUMED" in run.said(), "the step to go on from")
    if not run.running():
        raise Unexpected(f"it did not go on:\n{run.said()}")
    return "went on"


def cut_config(run: Run, _: random.Random) -> str:
    """config.json has lost its second half; it is put back after the refusal."""
    path = run.workdir / "config.json"
    with _changed(path, path.read_bytes()[: path.stat().st_size // 2]):
        return _refuses(run, "config.json")


def new_image(run: Run, _: random.Random) -> str:
    """An image has been added to the folder; it is taken away after the refusal."""
    path = run.images / "train" / "0" / "new.png"
    with _changed(path, next((run.images / "train" / "1").iterdir()).read_bytes()):
        return _refuses(run, "dataset.json")


def bad_image(run: Run, _: random.Random) -> str:
    """Images have been overwritten with noise; put back after the refusal."""
    paths = sorted((run.images / "train").rglob("*.png"))
    with contextlib.ExitStack() as stack:
        for path in paths[::4]:  # of a quarter some are among those that are looked at
            stack.enter_context(_changed(path, b"no image"))
        return _refuses(run, "content")


@contextlib.contextmanager
def _changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def _refuses(run: Run, naming: str) -> str:
    run.start()
    return run.ended(_REFUSED, saying=naming)


def after_a_kill(fault: Fault) -> Fault:
    """Returns a fault that is found by the next start, after a checkpoint was made."""

    def then(run: Run, rng: random.Random) -> str:
        checkpoints = run.workdir / "checkpoints"
        run.wait_until(lambda: len(steps.committed(checkpoints)) > 1, "two checkpoints")
        run.kill()
        return fault(run, rng)

    return then


_PHASES = ("start", "compile", "step", "save", "evaluate")
FAULTS: dict[str, Fault] = {
    f"{number.name} in phase {phase}": signalled(number, phase)
    for number in (signal.SIGKILL, signal.SIGTERM) for phase in _PHASES
} | {
    f"{number.name} in phase step": signalled(number, "step")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
} | {
    "stopped for seconds (SIGSTOP)": stopped,
    "a loader worker killed (SIGKILL)": worker_dies(signal.SIGKILL),
    "a loader worker crashes (SIGSEGV)": worker_dies(signal.SIGSEGV),
    "a second start in its directory": second_start,
    "no space for a checkpoint": disk_full,
} | {
    name: after_a_kill(fault) for name, fault in {
        "a bit of the newest checkpoint flipped": flipped_byte,
        "a file of the newest checkpoint cut": cut_file,
        "the newest checkpoint without digests": no_digests,
        "half a save left behind": half_a_save,
        "metrics.jsonl cut within a line": cut_metrics,
        "time.json damaged": damaged("time.json"),
        "run.lock damaged": damaged("run.lock"),
        "config.json cut": cut_config,
        "an image added to the data": new_image,
        "images overwritten": bad_image,
    }.items()
}
