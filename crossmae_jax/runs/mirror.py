"""The small files of a run whose workdir is a bucket.

A bucket cannot be appended to, so metrics, pictures and descriptions are written to a
local directory and copied: what a run reads of itself comes from the bucket when it
starts, and what is new goes there before each checkpoint and at the end. Checkpoints do
not pass through here.

As the files go first, a checkpoint in the bucket always finds the lines of
metrics.jsonl up to its step. If a host dies between two copies, what it wrote since the
last one is lost: lines and pictures of steps after the newest checkpoint, which the
resumed run makes again. A host that dies between copy and checkpoint leaves lines of
steps that are no longer known; `metrics.MetricWriter` drops them.

Process 0 copies all, as it alone writes nearly all; the others what bears their number,
which are lists of images that cannot be decoded.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from crossmae_jax import paths
from crossmae_jax.distributed import parallel
from crossmae_jax.paths import AnyPath


class Home:
    """Where a run lies, and where its small files are written.

    Attributes:
      path: the workdir.
      local: the workdir itself if it is on a disk.
    """

    def __init__(self, path: AnyPath, local: Path):
        self.path, self.local = path, local
        self._copied: dict[Path, tuple[int, int]] = {}

    def name(self, path: AnyPath) -> AnyPath:
        """Returns the lasting path of a file that lies below `local`."""
        return self.path / path.relative_to(self.local)

    def push(self) -> None:
        """Copies to the bucket what is new since the last time; nothing on a disk."""
        if self.path == self.local:
            return
        bucket, number = paths.system(self.path), jax.process_index()
        for file, state in self._states().items():
            if self._copied.get(file) == state:
                continue
            if number and not file.name.endswith(f".process_{number}.jsonl"):
                continue
            bucket.pipe_file(os.fspath(self.name(file)), file.read_bytes())
            self._copied[file] = state

    def pull(self) -> None:
        """Copies from the bucket what a run reads of itself."""
        bucket = paths.system(self.path)
        for folder in (self.path, self.path / "best"):
            for file in folder.iterdir() if folder.is_dir() else ():
                if file.suffix not in (".json", ".jsonl") or file.is_dir():
                    continue
                target = self.local / file.relative_to(self.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(bucket.cat_file(os.fspath(file)))
        self._copied = self._states()

    def fetch(self, file: Path) -> None:
        """Copies one more file from the bucket, unless it is here or not there."""
        if self.path == self.local or file.exists() or not self.name(file).exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        bucket = paths.system(self.path)
        file.write_bytes(bucket.cat_file(os.fspath(self.name(file))))
        self._copied[file] = self._states()[file]

    def _states(self) -> dict[Path, tuple[int, int]]:
        states = {}
        for file in paths.files(self.local):
            if file.suffix != ".tmp":
                status = file.stat()
                states[file] = (status.st_mtime_ns, status.st_size)
        return states


@contextlib.contextmanager
def opened(workdir: str | AnyPath) -> Iterator[Home]:
    """Yields the home of a run; copies what is new at the end, however that comes.

    Raises:
      ValueError: if the workdir is in a bucket that cannot be reached from here.
    """
    path = paths.path(workdir)
    if not paths.is_remote(path):
        yield Home(path, path)
        return
    home = Home(path, Path(tempfile.mkdtemp(prefix="crossmae_jax-")))
    parallel.say(f"The files of {path} beside its checkpoints begin in {home.local}.")
    home.pull()
    try:
        yield home
    finally:
        home.push()
    shutil.rmtree(home.local)
