"""Sends the same images through both sides of a conversion, and says how they differ.

Tables of names and layouts cannot prove themselves. What proves them is another
implementation that makes of its file what our model makes of ours: of the formats mae
and timm timm's VisionTransformer, of simmim its Beit, of any Swin its SwinTransformer,
of huggingface the class of transformers that config.json names. Our own files are read
back, tensor by tensor.

The other side runs first and is gone before our tensors are read: one model is in
memory at a time. What a file does not tell, such as the number of heads of a bare .pth,
both sides take from the card, and it is not checked.
"""

import importlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from crossmae_jax import masking
from crossmae_jax.convert import (
    exporting,
    foreign,
    names,
    of_swin,
    opened,
    opening,
    packages,
    spellings,
    structure,
    torch_state,
)
from crossmae_jax.convert.cards import Card
from crossmae_jax.convert.files.tensor import Tensor, Tensors
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.convert.opened import Weights
from crossmae_jax.objectives import pretrain

Outputs = dict[str, np.ndarray]

NUM_IMAGES = 2
# Of the largest output. Sums in another order stay far below, wrong tensors far above.
TOLERANCE = 1e-3

# What must import for a package to be used; transformers imports its models late.
_VIT_MAE = "transformers.models.vit_mae.modeling_vit_mae"
_MODULES = {"timm": ("timm",), "transformers": ("transformers", _VIT_MAE)}
_EPSILON = {"layer_norm_eps": 1e-6}  # ours; transformers' own is 1e-12
_CLASSIFIER, _PRETRAINING = "ViTForImageClassification", "ViTMAEForPreTraining"
# Classes of transformers, and with which settings they are loaded.
_CLASSES: dict[str | None, dict[str, Any]] = {
    _PRETRAINING: _EPSILON,
    "ViTMAEModel": {"mask_ratio": 0.0, **_EPSILON},
    "ViTModel": {"add_pooling_layer": False, **_EPSILON},
    _CLASSIFIER: _EPSILON,
}
# What packages raise when they refuse a file.
_REFUSALS = (
    AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError,
    pickle.PickleError,
)


def compare(
    weights: Weights, path: Path, format: str, *, place: str | None = None
) -> list[str]:
    """Returns lines that say by how much the two sides differ, and what is unchecked.

    Args:
      weights: our side.
      path: what the other side reads: the imported file, or the exported one.
      format: of that file: "mae", "simmim", "timm", "huggingface" or "safetensors".
      place: of the tensors in it, as in `contents.Contents`, if it has several.

    Raises:
      ConversionError: if the other side refuses the file, or the difference is more
        than rounding.
    """
    if format == "safetensors":
        tensors = opening.open_weights(path, format=format).tensors
        _check_same(tensors, weights.tensors)
        return [f"check: {len(tensors)} tensors read back, all exactly as they were"]
    package = "transformers" if format == "huggingface" else "timm"
    if obstacle := packages.obstacle(package, _MODULES[package]):
        return [f"not checked: {obstacle}"]
    import safetensors

    reader = f"{package} {importlib.import_module(package).__version__}"
    run = {"simmim": _beit, "huggingface": _transformers}.get(format, _timm)
    if weights.card.encoder.windows:
        run = _swin
    images, noise = _inputs(weights.card)
    try:
        theirs, lines = run(weights, path, images, noise, place)
    except ConversionError:
        raise
    except pickle.UnpicklingError:
        return ["not checked: beside its tensors the file holds objects that "
                "torch.load(weights_only=True) does not take"]
    except (*_REFUSALS, safetensors.SafetensorError) as error:
        raise ConversionError(
            f"{reader} refuses {path} ({type(error).__name__}): {error}"
        ) from error
    if theirs:
        ours = _ours(weights, images, noise, predicts="predictions" in theirs)
        summary = _differences(ours, theirs, reader)
        if path.is_file():
            summary += "; both sides take heads, pooling and activation as said above"
        lines = [summary, *lines]
    return lines


def _inputs(card: Card) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images, and the noise that orders their patches."""
    random, (height, width) = np.random.default_rng(0), card.image_size
    num_patches = card.encoder.grid[0] * card.encoder.grid[1]
    shape = (NUM_IMAGES, height, width, card.channels)
    # Patches that are standardised already would hide whether targets are.
    images = 1 + 2 * random.standard_normal(shape, np.float32)
    return images, random.random((NUM_IMAGES, num_patches), np.float32)


def _differences(ours: Outputs, theirs: Outputs, reader: str) -> str:
    phrases = []
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, (name, ours[name].shape)
        largest = np.abs(expected).max()
        difference = np.abs(ours[name] - expected).max()
        if not difference <= TOLERANCE * largest:  # nor if it is not a number
            raise ConversionError(
                f"The two sides disagree in {name}: by up to {difference:.2g}, where "
                f"the largest value of {reader} is {largest:.3g}; rounding explains "
                f"{TOLERANCE:g} of that at most."
            )
        verb = "by" if phrases else "differ by at most"
        phrases.append(f"{name} {verb} {difference:.1e} (largest value {largest:.3g})")
    return f"check: {NUM_IMAGES} random images through {reader}: {', '.join(phrases)}"


def _check_same(tensors: Tensors, expected: Tensors, *, but: str = " ", left_over=()):
    """Checks names and shapes, and the values of what does not start with `but`."""
    shapes = {name: value.shape for name, value in expected.items()}
    names.check_match(tensors, shapes, left_over=left_over)
    if differing := [
        name for name, value in tensors.items() if not name.startswith(but)
        and not np.array_equal(value.read(), expected[name].read())
    ]:
        raise ConversionError(
            "The two sides disagree in the values of tensors."
            + names.listing("differing", differing)
        )


def _ours(
    weights: Weights, images: np.ndarray, noise: np.ndarray, *, predicts: bool
) -> Outputs:
    """Returns tokens, features and logits, or predictions of all masked patches."""
    if predicts:
        objective = pretrain.Pretrain(structure.config_of(weights.card))
        num_keep = objective.counts.num_keep
        counts = masking.TokenCounts(num_keep, noise.shape[1] - num_keep, 0)
    elif weights.card.kind == "pretrain":
        weights = opened.encoder_of(weights)
    model = structure.build(weights.card)

    def outputs(variables, images, noise):
        if predicts:
            ids = masking.token_ids(noise, counts)
            predicted = model.apply(variables, images, ids)
            target = objective.target(variables, images)
            loss, _ = objective.prediction_loss(predicted, target, ids)
            return {"predictions": predicted["pixels"].values, "loss": loss}
        if weights.card.kind == "classifier":
            results = model.apply(variables, images)._asdict()
            return results | {"tokens": results["tokens"].sequence}
        variables = {name: tree["encoder"] for name, tree in variables.items()}
        return {"tokens": model.apply(variables, images).last.sequence}

    like = traverse_util.flatten_dict(structure.abstract_variables(weights.card))
    variables = traverse_util.unflatten_dict({
        # JAX copies: of one tensor at a time there are two.
        path: jnp.asarray(weights.tensors["/".join(path[1:])].read(), leaf.dtype)
        for path, leaf in like.items()
    })
    with jax.default_matmul_precision("highest"):
        results = jax.jit(outputs)(variables, jnp.asarray(images), jnp.asarray(noise))
    return {name: np.asarray(x) for name, x in results.items() if x is not None}


def _timm(weights, path, images, noise, place) -> tuple[Outputs, list[str]]:
    """Returns what timm makes of a file, or of a folder as its users load it."""
    import timm

    card, lines = weights.card, []
    if path.is_dir():
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        state = torch_state.with_layer_scale(torch_state.read(path, place))
        if card.kind == "pretrain":
            state, lines = _encoder_state(weights, state)
            card = card.encoder_only()
        elif card.kind == "encoder":  # beside which a file may have more
            state = _as_added(state)
            state = {n: x for n, x in state.items() if not foreign.comes_after(n)}
        model = _timm_model(card, state)
        model.load_state_dict(state, strict=True, assign=True)
    return _outputs(model, card, images), lines


def _outputs(model: Any, card: Card, images: np.ndarray) -> Outputs:
    """Returns what one of timm's models makes of images."""
    import torch

    model.eval()
    with torch.inference_mode():
        tokens = model.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
        outputs = {"tokens": tokens.flatten(1, -2)}  # a Swin's lie on a grid
        if card.kind == "classifier":
            outputs["features"] = model.forward_head(tokens, pre_logits=True)
            if card.model["num_classes"]:
                outputs["logits"] = model.forward_head(tokens)
    return {name: value.numpy() for name, value in outputs.items()}


def _timm_model(card: Card, state: dict[str, Any]) -> Any:
    """Returns timm's model of a card, with what `folding` has folded of a file."""
    import timm
    import torch

    config = exporting.timm_config(card)
    arguments = config["model_args"] | {"num_classes": config["num_classes"]}
    rows = math.prod(card.encoder.grid)
    arguments["no_embed_class"] = state["pos_embed"].shape[1] == rows
    if "blocks.0.ls1.gamma" in state:
        arguments["init_values"] = 1.0
    with torch.device("meta"):  # takes no memory but the file's
        model = timm.create_model(config["architecture"], **arguments)
        if "head.0.running_mean" in state:  # as in MAE's script for linear probes
            norm = torch.nn.BatchNorm1d(card.encoder.dim, affine=False, eps=1e-6)
            model.head = torch.nn.Sequential(norm, model.head)
    return model


def _encoder_state(weights, state) -> tuple[dict[str, Any], list[str]]:
    """Returns the encoder's part of a MAE file, and compares the values of the rest."""
    theirs = {
        name: Tensor(tuple(x.shape), np.dtype(np.float32), lambda x=x: x.numpy())
        for name, x in state.items()
    }
    ours, unknown = spellings.to_ours(spellings.MAE, theirs)
    _check_same(ours, weights.tensors, but="encoder/", left_over=unknown)
    _, rest = spellings.to_ours(spellings.TIMM, theirs)
    state = _as_added(state)
    state = {name: x for name, x in state.items() if name not in rest}
    return state, [
        "not checked: the outputs of the decoder, for want of a package with one; "
        f"its {len(rest)} tensors agree exactly in names, shapes and values"
    ]


def _as_added(state: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors with zeros for the class token's position, if CrossMAE's.

    timm adds that row, the reference does not.
    """
    if "decoder_blocks.0.cross_attn.q.bias" not in state:
        return state
    positions = state["pos_embed"].clone()
    positions[:, 0] = 0
    return state | {"pos_embed": positions}


def _beit(weights, path, images, noise, place) -> tuple[Outputs, list[str]]:
    """Returns what timm's Beit makes of a file of SimMIM."""
    import torch
    from timm.models import beit

    card, lines = weights.card, []
    encoder, classifies = card.encoder, card.kind == "classifier"
    state = {
        name.removeprefix("encoder."): value
        for name, value in torch_state.read(path, place).items()
        if not name.endswith(("relative_position_index", "mask_token"))
    }
    behind = [name for name in state if name.startswith("decoder.")]
    if behind:
        lines.append(
            "not checked: the outputs of the decoder, one layer, for want of a package "
            "with one"
        )
    state = {name: x for name, x in state.items() if name not in behind}
    if card.kind == "encoder":  # beside which a file may have more
        state = {n: x for n, x in state.items() if not foreign.comes_after(n)}
    model = beit.Beit(
        img_size=card.image_size, patch_size=card.patch_size, in_chans=card.channels,
        num_classes=card.model["num_classes"] if classifies else 0,
        global_pool="avg" if card.model.get("pool") == "mean" else "token",
        embed_dim=encoder.dim, depth=encoder.depth, num_heads=encoder.num_heads,
        qkv_bias=encoder.qkv_bias == "qv", mlp_ratio=encoder.mlp_ratio,
        init_values=encoder.layer_scale,
        use_abs_pos_emb=encoder.positions != "none",
        use_rel_pos_bias=encoder.relative_bias == "per_block",
        use_shared_rel_pos_bias=encoder.relative_bias == "shared",
    )
    if "norm.weight" not in state:  # of a mean that is pooled
        model.norm = torch.nn.Identity()
    model.load_state_dict(state, strict=True)
    return _outputs(model, card, images), lines


def _swin(weights, path, images, noise, place) -> tuple[Outputs, list[str]]:
    """Returns what timm's SwinTransformer makes of a file or a folder."""
    import timm

    card, lines = weights.card, []
    if path.is_dir():
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
        return _outputs(model, card, images), lines
    state = of_swin.as_timm(torch_state.read(path, place))
    if card.kind == "pretrain":
        lines.append(
            "not checked: the outputs of the decoder, one layer, for want of a package "
            "with one"
        )
    if card.kind == "encoder":
        state = {n: x for n, x in state.items() if not foreign.comes_after(n)}
    config = of_swin.timm_config(card)
    model = timm.create_model(
        config["architecture"], num_classes=config["num_classes"],
        **config["model_args"],
    )
    model.load_state_dict(state, strict=True)
    return _outputs(model, card, images), lines


def _transformers(weights, path, images, noise, place) -> tuple[Outputs, list[str]]:
    """Returns what transformers makes of a folder."""
    import torch
    import transformers

    config = json.loads((path / "config.json").read_text())
    kind = next(iter(config.get("architectures") or ()), None)
    if kind not in _CLASSES:
        return {}, [f"not checked: {kind}; the classes that are: {', '.join(_CLASSES)}"]
    if place not in (None, "."):
        return {}, [f"not checked: transformers does not look under {place}"]
    if weights.card.kind == "encoder" and kind in (_CLASSIFIER, _PRETRAINING):
        return {}, [f"not checked: a {kind} does not return its encoder's output"]
    model, info = getattr(transformers, kind).from_pretrained(
        path, dtype=torch.float32, local_files_only=True, output_loading_info=True,
        **_CLASSES[kind],
    )
    misfits = ""
    for title in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, info[f"{title}_keys"]))
        keys = (name for name in keys if not name.startswith("pooler."))
        misfits += names.listing(title, keys)
    if misfits:
        raise ConversionError(f"transformers does not load {path} as it is.{misfits}")
    inputs = {"pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2)}
    if kind == "ViTMAEModel":
        noise = np.sort(noise)  # all patches stay visible, in this order
    if kind not in ("ViTModel", _CLASSIFIER):
        inputs["noise"] = torch.from_numpy(noise)
    with torch.inference_mode():
        outputs = model.eval()(**inputs, output_hidden_states=True)
    theirs = {}
    if kind == _PRETRAINING:
        masked = outputs.logits[outputs.mask.bool()]
        theirs["predictions"] = masked.unflatten(0, (NUM_IMAGES, -1))
        if weights.card.normalize is not None:
            theirs["loss"] = outputs.loss
    elif kind == _CLASSIFIER:
        theirs["logits"] = outputs.logits
    elif "encoder/norm/scale" in weights.tensors:
        theirs["tokens"] = outputs.last_hidden_state
    else:  # theirs has a norm, ours has none
        theirs["tokens"] = outputs.hidden_states[-1]
    return {name: value.numpy() for name, value in theirs.items()}, []
