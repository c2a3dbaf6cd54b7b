"""The loss of finished runs on all masked patches of held-out images.

A run's own numbers do not compare methods of throwing: with plain throwing the loss
that is trained on leaves thrown patches out. So each run's saved weights meet the same
images and the same visible patches twice, with the loss that it was trained with:

    as trained   masked patches are decoded or thrown as in training. What is thrown and
                 never predicted does not count: with random choice those that are
                 decoded are a fair sample of all, and several draws are averaged
    all decoded  nothing is thrown, which a run that threw has not met in training
"""

import json
from pathlib import Path

import jax
import numpy as np

from crossmae_jax import objectives, paths
from crossmae_jax.checkpoints import checkpointer
from crossmae_jax.data import pipeline, sources
from crossmae_jax.runs import workdir

AS_TRAINED, ALL_DECODED = "held_out/as_trained", "held_out/all_decoded"
_DRAWS = 16  # masks of an image


def losses(directory: Path) -> dict[str, float]:
    """Returns both losses of a finished run, measured once and kept beside it."""
    done = directory / "held_out.json"
    if not done.exists():
        paths.write_whole(done, json.dumps(_measure(directory)))
    return json.loads(done.read_text())


def _measure(directory):
    config = workdir.read_config(directory)
    objective = objectives.make(config)
    variables = checkpointer.restore_variables(directory / "checkpoints")

    @jax.jit
    def of_batch(batch, key):
        images = objective.normalize(batch)
        target = objective.target(variables, images)
        found = []
        for ids in (
            objective.sampler.draw(key, batch),
            objective.sampler.draw_all(key, batch, throw=False),
        ):
            predicted = objective.model.apply(variables, images, ids)
            found.append(objective.prediction_loss(predicted, target, ids)[0])
        return found

    # The same masks for every run, whatever its seed.
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), _DRAWS)
    values, images = [], []
    with pipeline.eval_batches(
        sources.make_source(config.data, "eval"), config.data,
        batch_size=config.data.batch_size, num_images=None, process_index=0,
        process_count=1, workdir=str(directory),
    ) as batches:
        for batch in batches:
            valid = batch["valid"]
            batch = {name: batch[name][valid] for name in ("image", "sample")}
            values.append(np.mean([of_batch(batch, key) for key in keys], axis=0))
            images.append(valid.sum())
    as_trained, all_decoded = np.average(values, axis=0, weights=images)
    return {AS_TRAINED: float(as_trained), ALL_DECODED: float(all_decoded)}
