"""Parity of Swin as an encoder: SimMIM's (arXiv 2111.09886), GreenMIM's (2205.13515).
"""

import json
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.objectives.pretrain import Pretrain
from tests.parity_files import Data, nhwc
from tests.parity_models import compare_outputs, nothing_left_out, prefixed
from tests.parity_report import Report
from tests.parity_simmim import at_all_places

_BUFFERS = ("relative_position_index", "attn_mask")


def encoder_of(ctor: dict[str, Any], *, epsilon: float) -> dict[str, Any]:
    """Translates the constructor arguments of a fixture's Swin."""
    if ctor.get("ape") or ctor.get("drop_path_rate") or not ctor["patch_norm"]:
        raise ValueError(
            "Absolute positions, stochastic depth and patches without a norm are not "
            "part of this."
        )
    depths, heads = (
        ".".join(map(str, ctor[name])) for name in ("depths", "num_heads")
    )
    size = f"W{ctor['embed_dim']}-D{depths}-H{heads}/{ctor['patch_size']}"
    encoder = common.swin(size, window=ctor["window_size"], norm_epsilon=epsilon)
    return encoder | dict(mlp_ratio=float(ctor["mlp_ratio"]))


def stride(ctor: dict[str, Any]) -> int:
    """Returns the side of a cell of the last stage in pixels."""
    return ctor["patch_size"] << len(ctor["depths"]) - 1


def to_ours(
    table: spellings.Table, state: Data
) -> tuple[dict[str, tensor.Tensor], list[str]]:
    """Returns a fixture's tensors under our names, but for its buffers."""
    theirs = {
        name: tensor.of_array(value) for name, value in state.items()
        if not name.endswith(_BUFFERS)
    }
    return spellings.to_ours(table, theirs)


def load(objective: Pretrain, table: spellings.Table, data: Data) -> Any:
    """Returns a fixture's weights as the variables of an objective."""
    like = jax.eval_shape(objective.init, jax.random.key(0))
    ours, left_over = to_ours(table, prefixed(data, "sd/"))
    return jax.tree.map(jnp.asarray, names.variables_of(
        ours, like, table=table, left_over=left_over
    ))


def compare_gradients(
    gradients: Any, table: spellings.Table, data: Data, report: Report
) -> None:
    """Compares the gradients of every tensor that a fixture has one of."""
    ours = traverse_util.flatten_dict(gradients, sep="/")
    theirs, left_over = to_ours(table, prefixed(data, "grad/"))
    if left_over:
        raise ValueError(f"Gradients of other tensors: {left_over}.")
    for name, value in theirs.items():
        report.gradient(f"grad/{name}", ours[name], value.read())


def _config(reference: dict[str, Any]) -> ConfigDict:
    ctor = reference["ctor"]
    side = stride(ctor)
    if reference["encoder_stride"] != side or reference["mask_patch_size"] % side:
        raise ValueError(
            f"Squares of {reference['mask_patch_size']} px and a decoder of stride "
            f"{reference['encoder_stride']} do not go with cells of {side} px."
        )
    encoder = encoder_of(ctor, epsilon=reference["layernorm_eps"])
    model = common.simmim_swin(encoder["size"], window=encoder["window"])
    model |= dict(encoder=encoder | dict(mask_tokens=True), dtype="float32")
    channels = ctor.get("in_chans", 3)
    ratio = reference["mask_ratio"]
    return ConfigDict(dict(
        model=model,
        masking=common.masking(mask_ratio=ratio, pred_ratio=ratio)
        | dict(unit=reference["mask_patch_size"] // side),
        loss=dict(kind="l1", thrown_weight=1.0, weights={}),
        target=dict(kind="pixels", normalize=False),
        data=dict(
            image_size=(ctor["img_size"],) * 2, channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    ))


def check_simmim(_path: Path, data: Data, report: Report) -> None:
    """Features, reconstruction, loss and gradients of one forward and backward pass."""
    reference = json.loads(str(data["config"]))
    objective = Pretrain(_config(reference))
    table = spellings.simmim_swin(tuple(reference["ctor"]["depths"]))
    variables = load(objective, table, data)
    images, ids = jnp.asarray(nhwc(data["imgs"])), _ids(data, objective)
    masked = objective.num_patches - objective.counts.num_keep
    report.exact(
        "masked units", masked // objective.sampler.unit**2,
        reference["mask_count_coarse"],
    )
    report.exact("counts", tuple(part.shape[1] for part in ids), objective.counts)

    def forward(params):
        return _outputs(objective, {**variables, "params": params}, images, ids)

    (loss, seen), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(
        variables["params"]
    )
    report.loss("loss", loss, data["loss"])
    for name, value in seen.items():
        report.output(name, value, data[name])
    compare_gradients(gradients, table, data, report)
    left = data.keys() - {"config", "imgs", "mask", "loss", *seen}
    if left := [name for name in left if not name.startswith(("sd/", "grad/"))]:
        raise ValueError(f"Not compared: {', '.join(left)}.")


def _ids(data: Data, objective: Pretrain) -> masking.TokenIds:
    """Returns ids of units from a mask of the cells of the first stage."""
    cells = data["mask"].shape[1] // objective.grid[0]
    hidden = data["mask"][:, ::cells, ::cells].astype(bool)
    if (np.kron(hidden, np.ones((1, cells, cells))) != data["mask"]).any():
        raise ValueError("The mask is not one of whole cells of the last stage.")
    hidden = hidden.reshape(len(hidden), -1)
    keep, pred = (
        jnp.asarray(np.stack([np.flatnonzero(row) for row in rows]))
        for rows in (~hidden, hidden)
    )
    return masking.TokenIds(keep, pred, pred[:, :0])


def _outputs(objective: Pretrain, variables, images, ids) -> tuple[Any, dict[str, Any]]:
    model, (rows, _) = objective.model, objective.grid
    predicted, state = model.apply(
        variables, images, ids, mutable=["intermediates"],
        capture_intermediates=lambda _, method: method == "__call__",
    )
    loss, _ = objective.prediction_loss(
        predicted, objective.target(variables, images), ids
    )
    seen = state["intermediates"]
    whole = at_all_places(model, variables, seen["encoder"]["__call__"][0], ids, seen)
    return loss, {
        "features": einops.rearrange(whole["features"], "b row col d -> b d row col"),
        "reconstruction": einops.rearrange(
            whole["predicted"], "b (row col) (p q c) -> b c (row p) (col q)",
            row=rows, p=objective.patch_size, q=objective.patch_size,
        ),
    }


_OF_GREEN = ("MaskedAutoencoder", "SwinTransformer")


def is_green(reference: dict[str, Any]) -> bool:
    """Returns whether a fixture is of GreenMIM."""
    return all(word in reference.get("class", "") for word in _OF_GREEN)


def _green(reference: dict[str, Any]) -> ConfigDict:
    ctor, mae = reference["encoder"], reference["mae"]
    encoder = encoder_of(ctor, epsilon=reference["layernorm_eps"])
    if mae["patch_size"] != stride(ctor) or reference["layernorm_eps"] != 1e-6:
        raise ValueError("The decoder's patches and norms are not those of ours.")
    model = common.green(encoder["size"], window=encoder["window"])
    model["decoder"].update(
        dim=mae["decoder_embed_dim"], depth=mae["decoder_depth"],
        num_heads=mae["decoder_num_heads"], mlp_ratio=float(mae["mlp_ratio"]),
    )
    model |= dict(encoder=encoder, dtype="float32")
    ratio, channels = reference["forward"]["mask_ratio"], ctor.get("in_chans", 3)
    return ConfigDict(dict(
        model=model,
        masking=common.masking(mask_ratio=ratio, pred_ratio=ratio)
        | dict(noise="shared", together=10**6),  # as many as there are
        loss=dict(kind="mse", thrown_weight=1.0, weights={}),
        target=dict(kind="pixels", normalize=bool(mae["norm_pix_loss"])),
        data=dict(
            image_size=(ctor["img_size"],) * 2, channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    ))


def _as_published(model: Any, images: Any, ids: masking.TokenIds) -> dict[str, Any]:
    """Encodes and decodes as GreenMIM's code does, with our modules.

    There the encoder gives visible units in raster order, and the decoder puts them
    back as if they came in the order of the noise: each visible feature gets the
    position of another one. Ours keeps the two together.
    """
    in_order = ids._replace(keep=jnp.sort(ids.keep, axis=1))
    encoded = model.encoder(images, in_order)
    misplaced = encoded._replace(last=encoded.last.replace(ids=ids.keep))
    contexts = model.fusion(misplaced)
    decoded = model.decoder(contexts, ids, {})
    none_visible = ids._replace(keep=ids.keep[:, :0])  # it predicts visible units, too
    return {
        "latent": encoded.last.sequence,
        "predicted": model.complete(decoded, ids, {}, contexts[-1]),
        "pred": model.decoder.head(
            "pixels", decoded["pixels"], none_visible, {}
        ).at(None),
    }


def check_green(_path: Path, data: Data, report: Report) -> None:
    """Activations, loss and gradients with one mask for all images."""
    reference = json.loads(str(data["config"]))
    objective = Pretrain(_green(reference))
    depths = tuple(reference["encoder"]["depths"])
    table = spellings.simmim_swin(depths)[:-2] + tuple(
        row for row in spellings.MAE if row.ours.startswith("decoder/")
    )
    # Ours has a row for a class token, too, which is not there.
    name = "sd/decoder_pos_embed"
    weights = data | {name: np.pad(data[name], ((0, 0), (1, 0), (0, 0)))}
    variables = load(objective, table, weights)
    images = jnp.asarray(nhwc(data["imgs"]))
    noise = jnp.repeat(jnp.asarray(data["noise"]), len(images), axis=0)
    ids = masking.token_ids(noise, objective.counts)
    target = objective.target(variables, images)

    def forward(params):
        seen = nn.apply(_as_published, objective.model)(
            {**variables, "params": params}, images, ids
        )
        return objective.prediction_loss(seen.pop("predicted"), target, ids)[0], seen

    (loss, outputs), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(
        variables["params"]
    )
    hidden = masking.mask_of(ids.pred, num_patches=objective.num_patches)
    outputs |= {"loss": loss, "mask": hidden, "ids_restore": ids.keep}
    compare_outputs(outputs, data, report)
    compare_gradients(gradients, table, data, report)
    nothing_left_out(outputs.keys(), data, report)
