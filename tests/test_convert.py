"""Reading PyTorch checkpoints: names, layouts, refusals."""

import pickle
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from crossmae_jax import convert, torch_file
from crossmae_jax.objectives.pretrain import Pretrain
from tests.test_models import MAE, make_config

GOLDEN = Path(__file__).parent / "golden"


def _checkpoint():
    return torch_file.read(GOLDEN / "ckpt_mae.pth")


def _like(**changes):
    config = make_config(
        **MAE, **dict(
            dict(model__size="W16-D2-H2/8", model__decoder_dim=16,
                 model__decoder_depth=1, data__image_size=(32, 32)), **changes
        ),
    )
    return jax.eval_shape(Pretrain(config).init, jax.random.key(0))


def test_weights_moments_and_arguments_are_read_without_pytorch():
    checkpoint = _checkpoint()
    assert checkpoint["args"]["mask_ratio"] == 0.75
    assert checkpoint["epoch"] == 3
    assert checkpoint["model"]["pos_embed"].shape == (1, 17, 16)
    assert len(checkpoint["optimizer"]["state"]) == 48


def test_every_tensor_finds_its_place():
    state = _checkpoint()["model"]
    variables = convert.from_torch(state, _like())
    kernel = variables["params"]["encoder"]["blocks_1"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, state["blocks.1.attn.qkv.weight"].T)
    assert len(jax.tree.leaves(variables)) == len(state)


def test_a_misfit_lists_every_difference():
    state = dict(_checkpoint()["model"], extra=np.zeros(3))
    del state["norm.bias"]
    with pytest.raises(ValueError) as error:
        convert.from_torch(state, _like(model__decoder_dim=8))
    text = str(error.value)
    assert "only in the model (1):\n    norm.bias" in text
    assert "only in the checkpoint (1):\n    extra" in text
    assert "mask_token: (1, 1, 16), expected (1, 1, 8)" in text


class _Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def _write(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    target = tmp_path / "made_by_the_checkpoint"
    payload = pickle.dumps({"model": _Malice(target)})
    pickle.loads(payload)
    assert target.exists(), "the payload does harm where it is trusted"
    target.unlink()
    _write(tmp_path / "evil.pth", payload)
    with pytest.raises(ValueError, match="nothing in the file was executed"):
        torch_file.read(tmp_path / "evil.pth")
    assert not target.exists()


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    # What torch.save writes for a 2 x 2 tensor at offset 2 of a storage of 4 values.
    payload = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n"
        b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x02"
        b"K\x02K\x02\x86K\x02K\x01\x86\x89NtR."
    )
    path = tmp_path / "outside.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    with pytest.raises(ValueError, match="reaches outside its storage of 4 values"):
        torch_file.read(path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a zip archive as PyTorch >= 1.6 writes"):
        torch_file.read(tmp_path / "text.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(ValueError, match="expected one data.pkl inside, found 0"):
        torch_file.read(tmp_path / "other.pth")
