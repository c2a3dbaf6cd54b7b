"""Metrics as TensorBoard reads them: event files in `workdir/tensorboard`."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer import event_file_writer


class Events:
    """Writes event files.

    Args:
      first_step: TensorBoard forgets this step and later ones of earlier event files.
    """

    def __init__(self, workdir: Path, *, first_step: int):
        self._writer = event_file_writer.EventFileWriter(str(workdir / "tensorboard"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(first_step, session_log=start)

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """Writes numbers of one step; they are on disk when this returns."""
        self._add(step, summary=summary_pb2.Summary(value=[
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
        ]))

    def _add(self, step, **content):
        self._writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=step, **content)
        )
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
