"""Metrics as TensorBoard reads them: event files in `workdir/tensorboard`.

TensorBoard's own writer of such files writes beside the program, in a thread that dies
of a full disk with a traceback; here an error comes to whoever writes.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import record_writer

from crossmae_jax import paths


class Events:
    """Writes an event file.

    Args:
      first_step: TensorBoard forgets this step and later ones of earlier event files.
    """

    def __init__(self, workdir: Path, *, first_step: int):
        self._path = _new_path(workdir / "tensorboard")
        with paths.named(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = record_writer.RecordWriter(open(self._path, "xb"))
        self._add(0, file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(first_step, session_log=start)

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """Writes numbers of one step; they are on disk when this returns."""
        self._add(step, summary=summary_pb2.Summary(value=[
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]))

    def _add(self, step, **content):
        event = event_pb2.Event(wall_time=time.time(), step=step, **content)
        with paths.named(self._path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        with paths.named(self._path):
            self._writer.close()


def _new_path(directory: Path) -> Path:
    """Returns where the next file goes; TensorBoard reads them in this order."""
    number, now = 0, int(time.time())
    while True:
        name = f"events.out.tfevents.{now:010d}.{socket.gethostname()}"
        path = directory / f"{name}.{os.getpid()}.{number}"
        if not path.exists():
            return path
        number += 1
