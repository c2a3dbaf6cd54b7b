"""Where a model looks in each training image, found out anew every few epochs: AMT.

AMT (arXiv 2211.15362) hides what the model attends to. So many epochs apart the encoder
sees every training image as a whole, squashed to its size, and what the class token of
the last block attends to becomes the weights of the image's patches. Masks are drawn
with them (`masking.weighted`) until the next time; before the first time they are drawn
as `config.attention_maps.before` says.

    WORKDIR/attention_maps/step_00012511.npy           made of the state after that step
    WORKDIR/attention_maps/step_00012511.npy.sha256    as `sha256sum` writes it

So the batches of a run are a function of (seed, step) and of the newest of these files
that is not younger than the step. A run that goes on in the middle of such a leg reads
it. The state that one is made of is saved before, and a run that goes on from it makes
it anew. When one is made, those that no checkpoint goes on from any more are removed.

The maps are kept in half precision: 392 bytes an image of 14 x 14 patches.
"""

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from crossmae_jax import errors, paths, ranges
from crossmae_jax.checkpoints import digests
from crossmae_jax.data import pipeline, sources, weights
from crossmae_jax.distributed import parallel, preemption
from crossmae_jax.evals import features, outputs, while_training
from crossmae_jax.runs import mirror

_FOLDER = "attention_maps"
SECONDS = "eval/attention_maps/seconds"
_OUTPUT = "attention_map"
_SPEAK = 10.0  # seconds, after which is said how far it is


def steps(config: ConfigDict, *, steps_per_epoch: float, total: int) -> list[int]:
    """Returns after which steps maps are made; [] for a run without.

    Raises:
      ValueError: if there would be none in the whole run, or settings contradict each
        other.
    """
    every = config.get("attention_maps", {}).get("every_epochs", 0.0)
    ranges.check("attention_maps.every_epochs", every, least=0)
    orders = config.get("masking", {}).get("noise") == "weighted"
    cuts = config.data.transform == "weighted"
    if not orders == cuts == bool(every):
        raise ValueError(
            f"masking.noise={config.get('masking', {}).get('noise')!r}, data.transform="
            f"{config.data.transform!r}, attention_maps.every_epochs={every:g}: AMT "
            "needs 'weighted', 'weighted' and a number of epochs after which weights "
            "are made anew; without it leave all three at 'uniform', 'classification' "
            "and 0.0."
        )
    if not every:
        return []
    apart = every * steps_per_epoch
    if apart < 1:
        raise ValueError(
            f"attention_maps.every_epochs={every:g} is less than one of "
            f"{steps_per_epoch:g} steps an epoch; each time takes a pass over all "
            "training images, so give epochs, such as 40.0."
        )
    made = [round(n * apart) for n in range(1, 1 + math.ceil(total / apart))]
    made = [step for step in made if step < total]
    if not made:
        raise ValueError(
            f"attention_maps.every_epochs={every:g} in a run of {config.epochs:g} "
            "epochs: none would ever be made; give fewer epochs, or 0.0 for a run "
            "without."
        )
    return made


def before(config: ConfigDict) -> ConfigDict:
    """Returns the settings of training before there are maps: all patches alike."""
    config = config.copy_and_resolve_references()
    config.masking.update(config.attention_maps.before)
    config.masking.noise = "uniform"
    return config


class AttentionMaps:
    """The maps of one run, whose settings `steps` has found to fit each other.

    Args:
      source: the training images.
      home: where the files lie.
    """

    def __init__(
        self,
        config: ConfigDict,
        objective: Any,
        source: sources.Source,
        *,
        mesh: jax.sharding.Mesh,
        home: mirror.Home,
        key: jax.Array,
    ):
        if _OUTPUT not in objective.outputs:
            raise ValueError(
                f"attention_maps.every_epochs={config.attention_maps.every_epochs:g}: "
                "AMT hides what the class token attends to, and needs a class token, "
                "which this encoder has not; set config.model.encoder.kind='vit', or "
                "attention_maps.every_epochs=0.0."
            )
        blank = pipeline.blank_batch(config.data, batch_size=1)
        # Whatever the noise refuses is known before the first step.
        jax.eval_shape(objective.sampler.draw, key, blank)
        self._data = config.data.copy_and_resolve_references()
        self._data.transform = "squashed"
        self._grid, self._source = objective.grid, source
        self._mesh, self._home = mesh, home
        self._outputs = outputs.Compiled(objective, mesh, key=key)

    def file(self, step: int) -> Path:
        """Returns where the maps of a state are."""
        return self._home.local / _FOLDER / f"step_{step:08d}.npy"

    @property
    def num_bytes(self) -> int:
        """The size of a file."""
        return 2 * len(self._source) * math.prod(self._grid)

    def bytes_to_come(self, *, num_files: int) -> int:
        """Returns what so many files take on the disk, without those there are."""
        there = paths.files(self._home.local / _FOLDER)
        there = sum(file.suffix == ".npy" for file in there)
        return max(num_files - there, 0) * self.num_bytes

    def source(self, step: int) -> sources.Source:
        """Returns the training images with the maps of a state.

        Raises:
          ValueError: if these are not there.
          FileError: if they are not as they were written.
        """
        file = self.file(step)
        for each in (file, _digest_of(file)):
            self._home.fetch(each)
        opened, listed = weights.WithWeights(self._source, file), _digest_of(file)
        if not listed.exists():
            raise errors.FileError(
                f"{self._home.name(file)} lacks {listed.name} beside it, by which it "
                f"is known to be whole. {weights.CURE}"
            )
        if listed.read_bytes().split()[:1] != [digests.of(file).encode()]:
            raise errors.FileError(
                f"{self._home.name(file)} is not as it was written: its digest is not "
                f"that in {listed.name}. {weights.CURE}"
            )
        return opened

    def trace(self, variables: Any) -> None:
        """Traces what will be computed, without computing it."""
        blank = pipeline.blank_batch(
            self._data, batch_size=self._data.batch_size, valid=True
        )
        where = parallel.batch_sharding(self._mesh)
        batch = parallel.with_sharding(blank, where)
        self._outputs.trace(_OUTPUT, variables, batch)

    def make(
        self,
        step: int,
        variables: Any,
        *,
        stop: preemption.Stop,
        say: Callable[[str], None],
    ) -> dict[str, float]:
        """Makes the maps of a state; returns what it cost, as metrics.

        All processes must call it.

        Raises:
          preemption.Interrupted: if `stop` is set meanwhile; no file is left then.
        """
        begin, file, total = time.monotonic(), self.file(step), len(self._source)
        if self._writes:
            self._write(file, self._rows(variables, stop, say))
        else:
            for _ in self._rows(variables, stop, say):
                pass
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"attention maps {step}")
        seconds = time.monotonic() - begin
        say(
            f"attention maps of {total} images: {seconds:.1f} s, "
            f"{self.num_bytes / 1e6:.3g} MB in {self._home.name(file)}"
        )
        return {SECONDS: seconds, "eval/attention_maps/bytes": float(self.num_bytes)}

    def _write(self, file, parts):
        """Writes parts of an array one after the other, and their digest."""
        file.parent.mkdir(exist_ok=True)
        shape = (len(self._source), *self._grid)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f2", "fortran_order": False, "shape": shape}
        )
        digest = hashlib.sha256(header.getvalue())
        with paths.writing_whole(file) as out:
            out.write(header.getvalue())
            for rows in parts:
                written = rows.astype("<f2").tobytes()
                out.write(written)
                digest.update(written)
        paths.write_whole(_digest_of(file), f"{digest.hexdigest()}  {file.name}\n")

    @property
    def _writes(self) -> bool:
        """Whether this process writes: of a workdir in a bucket each has its own."""
        return jax.process_index() == 0 or paths.is_remote(self._home.path)

    def _rows(self, variables, stop, say):
        """Yields the maps of some images at a time, in the order of the source."""
        opened = {"train": self._source}
        evaluation = while_training.of_sources(
            opened, self._data, mesh=self._mesh, workdir=self._home.local, wanted=(),
            stop=stop, **self._outputs.of(variables),
        )
        give, done, spoke = evaluation.output(_OUTPUT), 0, time.monotonic()
        for batch in evaluation.batches("train", None):
            batch = evaluation.place(batch)
            valid, sample, found = features.to_host(
                (batch["valid"], batch["sample"], give(batch))
            )
            # Whatever the order of processes and devices, rows are those of images.
            yield found[valid][np.argsort(sample[valid])]
            done += int(valid.sum())
            if time.monotonic() - spoke > _SPEAK:
                spoke = time.monotonic()
                say(f"attention maps: {done} of {len(self._source)} images")

    def remove_all_but(self, steps: Iterable[int]) -> None:
        """Removes files from which no checkpoint goes on.

        Args:
          steps: of the states whose maps are needed.
        """
        needed = {self.file(step) for step in steps}
        needed |= {_digest_of(file) for file in needed}
        if not self._writes:
            return
        for file in paths.files(self._home.local / _FOLDER):
            if file not in needed:
                file.unlink()
                if jax.process_index() == 0 and self._home.path != self._home.local:
                    self._home.name(file).unlink(missing_ok=True)


def _digest_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")
