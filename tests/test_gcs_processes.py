"""Two real processes that share nothing but a bucket make one run there.

It is AMT's, whose maps of the training images lie in the bucket, too.
"""

import io
import json

import jax
import numpy as np

from crossmae_jax import paths
from crossmae_jax.checkpoints import checkpointer, digests
from crossmae_jax.data.sets import digits
from tests import bucket as buckets
from tests import processes, test_processes

SETTINGS = """
from configs import digits_cross

def get_config():
    config = digits_cross.get_config()
    config.evals = {}
    config.attention_maps.every_epochs = 3 * 64 / 1442
    config.masking.noise = config.data.transform = "weighted"
    config.data.weights_grid = (4, 4)
    return config
"""
RUN = f"gs://{buckets.NAME}/run"


def test_two_processes_write_their_parts_and_go_on(digits_dir, tmp_path, monkeypatch):
    digits.prepare(digits_dir)
    whole = test_processes.arguments(digits_dir, RUN, **{
        "mesh.fsdp": 4, "epochs": 6.5 * 64 / 1442, "checkpoint.every_epochs":
        2 * 64 / 1442, "optim.warmup_epochs": 0.1, "model.encoder.size": "W16-D1-H2/4",
        "model.fusion.maps": (-1,),
    })
    settings = tmp_path / "settings.py"
    settings.write_text(SETTINGS)
    whole[1] = f"--config={settings}"
    with buckets.serve() as bucket:
        for name, value in buckets.environment(bucket.url).items():
            monkeypatch.setenv(name, value)
        with processes.started([whole] * 2, tmp_path / "first") as group:
            assert group.wait() == [0, 0], group.all_said()
            assert f"FRESH START in {RUN} (--resume=auto)\n" in group.said(0)
        place = "run/checkpoints/6"
        for item in ("variables", "optimizer"):
            for number in (0, 1):  # each has written its part
                assert bucket.names(f"{place}/{item}/ocdbt.process_{number}/")
        # Each object is listed, whoever wrote it.
        listed = bucket.read(f"{place}/{digests.LIST}").decode().splitlines()
        assert len(listed) == len(
            bucket.names(f"{place}/variables/") + bucket.names(f"{place}/optimizer/")
        )
        order = bucket.written
        assert order.index(f"{place}/{digests.LIST}") < order.index(
            f"{place}/{paths.COMMITTED}"
        )
        first = checkpointer.restore_variables(f"{RUN}/checkpoints")
        maps = "run/attention_maps/step_00000003.npy"
        made = bucket.read(maps)
        assert np.load(io.BytesIO(made)).shape == (1442, 4, 4)
        assert order.index(maps) < order.index(f"run/checkpoints/4/{paths.COMMITTED}")

        bucket.delete(f"{place}/{paths.COMMITTED}")  # as if both had died
        with processes.started([whole] * 2, tmp_path / "again") as group:
            assert group.wait() == [0, 0], group.all_said()
            assert f"RESUMED at step 4 of 6 from {RUN}\n" in group.said(0)
        again = checkpointer.restore_variables(f"{RUN}/checkpoints", step=6)
        for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
            np.testing.assert_array_equal(a, b)
        text = bucket.read("run/metrics.jsonl").decode()
        steps = [json.loads(line)["step"] for line in text.splitlines()]
        assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
        assert not bucket.names("run/bad_images")
        assert bucket.read(maps) == made and bucket.written.count(maps) == 1
