"""Programs that take the place of gcloud, srun, ssh and the like under the launchers.

Each notes how it was called, then does what the next answer for such a call says. The
last answer for a call stands for all later ones; without any, it succeeds in silence.
"""

import fnmatch
import os
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TRAINING = [
    "--config=configs/vitb_cross.py", "--workdir=/mnt/shared/run",
    "--heartbeat_seconds=60", "--resume=must", "--deterministic",
]

# One line of bash for each answer: pattern, status, what is printed. "hang" as a status
# stays until it is told to end, and ends with 75 as a training would; "orphan" ends
# well and leaves a process behind, such as a loader worker.
STUB = r"""#!/usr/bin/env bash
name=${0##*/}
printf '%s\n' "$name ${*//$'\n'/ }" >> "$STUBS/calls"
[[ ! ${JAX_PROCESS_ID:-} ]] ||
    echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" >> "$STUBS/env"
for answers in "$STUBS/$name".*; do
    [[ -s $answers ]] || continue
    { read -r pattern; } < "$answers"
    [[ "$*" == $pattern ]] || continue
    IFS=$'\t' read -r status printed < <(sed -n 2p "$answers")
    [[ $(wc -l < "$answers") == 2 ]] || sed -i 2d "$answers"
    [[ ! $printed ]] || printf '%b\n' "$printed"
    [[ $status != orphan ]] || { sleep 20 & exit; }
    [[ $status == hang ]] || exit "$status"
    trap 'kill $!; exit 75' TERM
    sleep 60 &
    echo $$ >> "$STUBS/pids"
    wait $!
done
"""


class Stubs:
    """A directory of stubs, first on the PATH of what `start` and `run` start.

    Args:
      directory: empty.
      names: of the programs.
    """

    def __init__(self, directory: Path, *names: str):
        self.directory = directory
        (directory / "bin").mkdir(parents=True)
        for name in names:
            path = directory / "bin" / name
            path.write_text(STUB)
            path.chmod(0o755)
        self._patterns = 0
        kept = {
            key: value for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "JAX_", "CROSSMAE_", "TMPDIR"))
        }
        self.environment = kept | {
            "PATH": f"{directory}/bin:{os.environ['PATH']}", "STUBS": str(directory),
            "HOME": str(directory), "CROSSMAE_LAUNCH_POLL": "0.02",
        }

    def answer(self, name: str, pattern: str, *answers: tuple[int | str, str]) -> None:
        """Sets what calls that match a shell's pattern return and print, in order."""
        self._patterns += 1
        lines = [pattern, *(f"{status}\t{printed}" for status, printed in answers)]
        path = self.directory / f"{name}.{self._patterns:02d}"
        path.write_text("\n".join(lines) + "\n")

    def calls(self, pattern: str = "*") -> list[str]:
        """Returns the calls that match, as the program's name and its arguments."""
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return fnmatch.filter(lines, pattern)

    def start(self, script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
        """Starts a launcher in a process group of its own."""
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments], cwd=cwd, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, cwd: Path = ROOT) -> "Ended":
        """Runs a launcher to its end."""
        return ended(self.start(script, *arguments, cwd=cwd))

    def hanging(self, count: int = 1) -> list[int]:
        """Waits until so many stubs hang, and returns their process numbers."""
        path = self.directory / "pids"
        path.touch()
        self._wait_until(lambda: path.read_text().count("\n") >= count)
        return [int(line) for line in path.read_text().split()]

    def wait_for(self, pattern: str, count: int = 1) -> None:
        """Waits until there were so many calls that match."""
        self._wait_until(lambda: len(self.calls(pattern)) >= count)

    def _wait_until(self, condition):
        until = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < until, self.calls()
            time.sleep(0.02)


class Ended:
    """What a launcher printed and how it ended."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


def ended(process: subprocess.Popen) -> Ended:
    """Waits for a launcher; after 30 seconds it is killed with all that it started."""
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(process.returncode, out, err)
