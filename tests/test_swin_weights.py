"""Files of Swins: SimMIM's, Swin's own and timm's, read, checked by timm, written."""

import json

import numpy as np
import pytest

from crossmae_jax import convert
from crossmae_jax.convert import exporting, opening
from crossmae_jax.convert.names import ConversionError
from tests.interop import timm, torch
from tests.test_parity import GOLDEN


def _simmim(tmp_path):
    """Writes what SimMIM's scripts save of a pre-training, and its numbers."""
    data = np.load(GOLDEN / "simmim_swin.npz")
    state = {
        key.removeprefix("sd/"): torch.from_numpy(data[key])
        for key in data.files if key.startswith("sd/")
    }
    path = tmp_path / "simmim.pth"
    torch.save({"model": state, "epoch": 99}, path)
    return path, state


def _timm(**changes):
    """Returns a random SwinTransformer of timm, of three stages."""
    model = timm.models.swin_transformer.SwinTransformer(**dict(
        dict(img_size=48, patch_size=2, embed_dim=12, depths=(2, 2, 1),
             num_heads=(2, 3, 4), window_size=6, num_classes=5, mlp_ratio=2.0),
        **changes,
    ))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=random))
            if value.ndim == 1 and name.endswith("weight"):
                value.add_(1)
    return model.eval()


def _as_microsofts(state):
    """Returns timm's tensors as Swin's own code and SimMIM's fine-tuning name them."""
    theirs = {}
    for name, value in state.items():
        parts = name.replace("head.fc.", "head.").split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        theirs[".".join(parts)] = value
    return theirs


def test_a_pre_training_of_simmim_is_checked_by_timm_and_written_as_it_was(tmp_path):
    path, state = _simmim(tmp_path)
    made = convert.import_weights(path, tmp_path / "ours")
    said = "\n".join(made.lines)
    assert "format simmim: names like layers.0.downsample" in said
    assert "check: 2 random images through timm" in said and "tokens by" not in said
    assert "not checked: the outputs of the decoder, one layer" in said
    assert "Swin W12-D2.2-H2.4/4, window 4; width 12, blocks [2, 2], heads [2, 4]" in (
        said
    )
    assert made.card.parts == ["encoder", "decoder"] and made.card.normalize is False
    assert (made.card.masking["mask_ratio"], made.card.masking["unit"]) == (0.6, 1)
    assert made.card.image_size == (32, 32)
    back = tmp_path / "back.pth"
    convert.export_weights(tmp_path / "ours", back, format="simmim")
    theirs = torch.load(back, weights_only=True)["model"]
    expected = {
        name: value for name, value in state.items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    again = opening.open_weights(back)
    assert again.card.model["encoder"] == made.card.model["encoder"]


@pytest.mark.parametrize("changes", [
    {}, dict(num_classes=0), dict(in_chans=1, img_size=(48, 96)),
    dict(window_size=4, img_size=32), dict(window_size=8, img_size=32),
], ids=["classifier", "headless", "oblong", "small", "wide"])
@pytest.mark.parametrize("names", ["timm", "simmim"])
def test_swins_of_both_spellings_are_what_timm_makes_of_them(tmp_path, changes, names):
    model = _timm(**changes)
    state = model.state_dict()
    path = tmp_path / "weights.pth"
    torch.save({"model": _as_microsofts(state)} if names == "simmim" else state, path)
    facts = {}
    if isinstance(changes.get("img_size"), tuple):
        facts["image_size"] = changes["img_size"]
    made = convert.import_weights(path, tmp_path / "ours", **facts)
    (line,) = [line for line in made.lines if line.startswith("check:")]
    classifies = changes.get("num_classes") != 0
    assert ("logits" in line) == classifies and "tokens" in line
    assert made.card.kind == ("classifier" if classifies else "encoder")
    if classifies:
        assert made.card.model["pool"] == "normed_mean"
    assert made.card.encoder.windows == {
        4: (4,) * 5, 8: (8,) * 5, 6: (6,) * 5
    }[changes.get("window_size", 6)][:4] + (made.card.encoder.windows[-1],)


def test_an_encoder_goes_to_timm_as_its_users_load_it(tmp_path):
    path, _ = _simmim(tmp_path)
    made = convert.export_weights(path, tmp_path / "timm", format="timm")
    said = "\n".join(made.lines)
    assert "left out: decoder, the encoder's mask token (timm has no place" in said
    assert "check: 2 random images through timm" in said
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 24)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["model_args"]["window_size"] == 4
    back = convert.import_weights(tmp_path / "timm", tmp_path / "back")
    assert back.card.kind == "encoder" and back.card.encoder.windows == (4,) * 4


def test_a_classifier_goes_to_timm_and_back(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(_timm().state_dict(), path)
    made = convert.export_weights(path, tmp_path / "timm", format="timm")
    assert "logits" in "\n".join(made.lines)
    images = torch.randn(2, 3, 48, 48)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.allclose(model(images), _timm()(images), atol=1e-5)
    simmim = convert.export_weights(tmp_path / "timm", tmp_path / "a.pth",
                                    format="simmim")
    assert "check: 2 random images" in "\n".join(simmim.lines)
    names = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert {"head.weight", "layers.0.downsample.norm.bias"} <= names.keys()


@pytest.mark.parametrize("format", ["mae", "huggingface"])
def test_formats_of_vits_have_no_place_for_a_swin(tmp_path, format):
    path, _ = _simmim(tmp_path)
    weights = opening.open_weights(path)
    with pytest.raises(ConversionError, match="is for ViTs, and this is a Swin W12"):
        exporting.select(weights, format, "all")


def test_windows_that_do_not_fit_the_images_ask_for_their_size(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(_timm(img_size=96).state_dict(), path)
    made = opening.open_weights(path)  # the last stage is taken for one window
    assert made.card.image_size == (48, 48) and "image_size" in made.card.assumed
    assert opening.open_weights(path, image_size=(96, 96)).card.image_size == (96, 96)
    with pytest.raises(ConversionError, match="are not those of images of 24 x 24 px"):
        opening.open_weights(path, image_size=(24, 24))
    with pytest.raises(ConversionError, match="window=6 does not divide the 16"):
        opening.open_weights(path, image_size=(32, 32))
    state = _timm().state_dict()
    torch.save({n: x for n, x in state.items() if ".0.blocks" not in n}, path)
    with pytest.raises(ConversionError, match="but none of stage 1"):
        opening.open_weights(path)
