"""Real processes that train together on this machine, each with its own devices.

As a program, `python -m tests.processes SECONDS`, one that meets others and fails in
the second of them, while the first expects an answer.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEVICES = 4  # of all processes together


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Group:
    """Processes of one run; `said(i)` is what process i printed, errors included."""

    def __init__(self, arguments: list[list[str]], logs: Path):
        self._logs, number = logs, len(arguments)
        logs.mkdir(parents=True)
        address = f"127.0.0.1:{free_port()}"
        self.processes = []
        for i, given in enumerate(arguments):
            # The tests' own flags ask for eight devices, and for no optimisation.
            flags = os.environ["XLA_FLAGS"].replace(
                "device_count=8", f"device_count={DEVICES // number}"
            )
            variables = {
                "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
                "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number),
                "JAX_PROCESS_ID": str(i),
            }
            with open(logs / f"{i}.log", "w") as log:
                self.processes.append(subprocess.Popen(
                    [sys.executable, "-m", *given], cwd=ROOT,
                    env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT,
                ))

    def said(self, i: int) -> str:
        return (self._logs / f"{i}.log").read_text()

    def all_said(self) -> str:
        return "\n".join(self.said(i) for i in range(len(self.processes)))

    def wait(self, seconds: float = 240) -> list[int]:
        """Returns the exit statuses of all."""
        end = time.monotonic() + seconds
        return [p.wait(max(1.0, end - time.monotonic())) for p in self.processes]

    def wait_for(self, path: Path, text: str, seconds: float = 240) -> None:
        """Returns as soon as a file has a text; fails if a process ends before."""
        end = time.monotonic() + seconds
        while not path.exists() or text not in path.read_text():
            assert all(p.poll() is None for p in self.processes), self.all_said()
            assert time.monotonic() < end, self.all_said()
            time.sleep(0.05)


@contextlib.contextmanager
def started(arguments: list[list[str]], logs: Path) -> Iterator[Group]:
    """Starts `python -m` for each list of arguments; none outlives the block."""
    group = Group(arguments, logs)
    try:
        yield group
    finally:
        for process in group.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def main(heartbeat_seconds: int) -> None:
    """Fails in process 1; asks the others in process 0, as long as they answer."""
    from jax.experimental import multihost_utils

    from crossmae_jax.distributed import cluster

    with cluster.leaving(heartbeat_seconds):
        cluster.join(heartbeat_seconds=heartbeat_seconds)
        for turn in range(100):
            multihost_utils.sync_global_devices(f"turn {turn}")
            if turn == 2 and os.environ["JAX_PROCESS_ID"] == "1":
                raise KeyError("only in process 1")


if __name__ == "__main__":
    main(int(sys.argv[1]))
