"""Parity of whole models: activations, losses, gradients, AdamW."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.optim import optimizers
from crossmae_jax.tokens import take_tokens
from tests.parity_files import Data, nhwc, token_counts
from tests.parity_report import LOSS, TRAJECTORY, Report

_MAE = "models_mae."


def make_config(reference: dict[str, Any]) -> ConfigDict:
    """Translates a fixture's `config` (constructor and forward arguments) to ours.

    Raises:
      ValueError: if the fixture asks for something that we do not have.
    """
    ctor, forward = reference["ctor"], reference["forward"]
    is_mae = reference["class"].startswith(_MAE)
    if (epsilon := reference.get("layernorm_eps", 1e-6)) != 1e-6:
        raise ValueError(f"Layer norm epsilon {epsilon}, not 1e-6.")
    maps = ctor.get("use_fm", [-1])
    mixes = not is_mae and ctor.get("weight_fm", False)
    mask_ratio = forward.get("mask_ratio", 0.75)
    pred_ratio = mask_ratio if is_mae else forward.get("kept_mask_ratio", 0.75)
    image_size = ctor["img_size"]
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    size = f"W{ctor['embed_dim']}-D{ctor['depth']}-H{ctor['num_heads']}"
    channels, mlp_ratio = ctor.get("in_chans", 3), float(ctor.get("mlp_ratio", 4.0))
    return ConfigDict(dict(
        model=dict(
            encoder=dict(
                kind="vit", size=f"{size}/{ctor['patch_size']}", mlp_ratio=mlp_ratio
            ),
            fusion=dict(
                kind="inter_block",
                # The reference's [-1] stands for all blocks, not for the last one.
                maps=None if list(maps) == [-1] else tuple(maps),
                input=bool(ctor.get("use_input", False)),
            ) if mixes else dict(kind="last"),
            decoder=dict(
                kind="mae" if is_mae else "cross", dim=ctor["decoder_embed_dim"],
                depth=ctor["decoder_depth"], num_heads=ctor["decoder_num_heads"],
                mlp_ratio=mlp_ratio,
                self_attention=bool(ctor.get("self_attn", False)),
            ),
            aggregator=dict(kind="none"), remat="selective", dtype="float32",
        ),
        # Above the mask ratio: see `token_counts`.
        masking=common.masking(
            mask_ratio=mask_ratio, pred_ratio=min(pred_ratio, mask_ratio)
        ),
        asked_pred_ratio=pred_ratio,
        loss=dict(kind="mse", thrown_weight=1.0, weights={}),
        target=dict(kind="pixels", normalize=bool(ctor.get("norm_pix_loss", False))),
        optim=optimizer(reference),
        data=dict(
            image_size=tuple(image_size), channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    ))


def optimizer(reference: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Returns the settings of a fixture's optimiser, as `config.optim`."""
    b1, b2 = reference.get("betas", (0.9, 0.95))
    return dict(
        name="adamw", b1=b1, b2=b2, weight_decay=reference.get("weight_decay", 0.05),
        decay_tokens=True, clip_norm=reference.get("clip_grad"),
        layer_decay=reference.get("layer_decay") or 1.0,
    ) | changes


def load(config: ConfigDict, state: dict[str, np.ndarray]) -> tuple[Pretrain, Any]:
    """Returns the objective, and the reference's weights as our variables."""
    objective = Pretrain(config)
    objective.counts = token_counts(
        objective.num_patches, config.masking.mask_ratio, config.asked_pred_ratio
    )
    like = jax.eval_shape(objective.init, jax.random.key(0))
    theirs = {name: tensor.of_array(value) for name, value in state.items()}
    ours, left_over = spellings.to_ours(spellings.MAE, theirs)
    if names.attends_across(ours):
        ours["encoder/pos_embed"] = names.zero_class_row(ours["encoder/pos_embed"])
    variables = names.variables_of(ours, like, table=spellings.MAE, left_over=left_over)
    return objective, jax.tree.map(jnp.asarray, variables)


def ours_of(name: str, value: np.ndarray) -> np.ndarray:
    """Returns one of their tensors in our layout."""
    theirs = {name: tensor.of_array(value)}
    (ours,) = spellings.to_ours(spellings.MAE, theirs)[0].values()
    return ours.read()


def _their_name(path: str) -> str:
    return spellings.their_names(spellings.MAE, path.partition("/")[2])[0]


def prefixed(data: Data, prefix: str) -> Data:
    return {
        name.removeprefix(prefix): value
        for name, value in data.items() if name.startswith(prefix)
    }


def _stored(module: nn.Module, method: str) -> bool:
    return method in ("__call__", "mix", "queries")


def model_outputs(objective: Pretrain, variables, images, ids) -> dict[str, Any]:
    """Returns every activation that a fixture may hold, under the fixture's names."""
    model = objective.model
    is_mae = model.decoder.gives_visible
    predicted, state = model.apply(
        variables, images, ids,
        capture_intermediates=_stored, mutable=["intermediates"],
    )
    seen = state["intermediates"]
    encoded = seen["encoder"]["__call__"][0]
    depth = model.decoder.depth
    target = objective.target(variables, images)["pixels"].values
    pred = predicted["pixels"].values
    if is_mae:  # the reference predicts visible patches, too
        head = nn.apply(lambda model, *args: model.decoder.head(*args), model)
        tokens = seen["decoder"]["__call__"][0]["pixels"]
        none_visible = ids._replace(keep=ids.keep[:, :0])  # nothing is cut off
        pred = head(variables, "pixels", tokens, none_visible, {}).at(None)
    else:
        target = take_tokens(target, ids.pred)
    outputs = {
        "pred": pred, "target": target, "latent": encoded.last.sequence,
        "encoder_input": encoded.maps[0].sequence,
        "mask": masking.mask_of(ids.pred, num_patches=objective.num_patches),
        "ids_restore": ids.keep,
        "loss": objective.masked_loss(variables, images, ids)[0],
    }
    if not is_mae:
        decoder = seen["decoder"]
        outputs["queries"] = decoder["queries"][0]
        outputs["dec_block_out"] = jnp.stack(
            [decoder[f"decoder_blocks_{i}"]["__call__"][0] for i in range(depth)]
        )
        outputs["dec_kv_in"] = jnp.stack([encoded.last.sequence] * depth)
    if model.fusion.used_maps is not None:
        chosen = [encoded.maps[j].sequence for j in model.fusion.used_maps]
        outputs["feats"] = jnp.stack(chosen)
        outputs["fm_mix"] = jnp.moveaxis(seen["fusion"]["mix"][0], 0, -1)
        contexts = seen["fusion"]["__call__"][0]
        outputs["dec_kv_in"] = jnp.stack([context.sequence for context in contexts])
    return outputs


def compare_outputs(outputs: dict[str, Any], data: Data, report: Report) -> None:
    for name in sorted(outputs.keys() & data.keys()):
        if name == "loss":
            report.loss(name, outputs[name], data[name])
        elif name == "mask":
            report.exact(name, outputs[name], data[name])
        elif name == "ids_restore":  # of the visible patches: no other order matters
            keep = np.asarray(outputs[name])
            place = np.take_along_axis(data[name], keep, axis=1)
            report.exact(name, place, np.arange(keep.shape[1])[None] + 0 * keep)
        else:
            report.output(name, outputs[name], data[name])


def check_model(_path: Path, data: Data, report: Report) -> None:
    """Activations, loss and gradients of one forward and backward pass."""
    config = make_config(json.loads(str(data["config"])))
    objective, variables = load(config, prefixed(data, "sd/"))
    images = jnp.asarray(nhwc(data["imgs"]))
    ids = masking.token_ids(jnp.asarray(data["noise"]), objective.counts)

    outputs = jax.jit(lambda v, x, i: model_outputs(objective, v, x, i))(
        variables, images, ids
    )
    compare_outputs(outputs, data, report)

    def loss(params):
        return objective.masked_loss({**variables, "params": params}, images, ids)[0]

    if any(name.startswith("grad/") for name in data):
        gradients = jax.jit(jax.grad(loss))(variables["params"])
        compare_gradients("grad/", gradients, data, report)
    nothing_left_out(outputs.keys(), data, report)


def compare_gradients(prefix: str, gradients: Any, data: Data, report: Report) -> None:
    """Compares the gradients that a file holds under a prefix.

    Raises:
      ValueError: if it holds some of parameters that we do not have.
    """
    expected = prefixed(data, prefix)
    for name, ours in by_their_name(gradients).items():
        if (theirs := expected.pop(name, None)) is not None:
            report.gradient(f"{prefix}{name}", ours, ours_of(name, theirs))
    if expected:
        raise ValueError(f"Gradients of unknown tensors: {', '.join(expected)}.")


def nothing_left_out(compared, data: Data, report: Report) -> None:
    """Fails the file if it holds an array that nobody looked at."""
    inputs = {"config", "imgs", "noise", "labels", "soft_targets"}
    left = [
        name for name in data
        if name not in compared and name not in inputs and "/" not in name
    ]
    if left:
        report.failed = True
        report.lines.append(f"FAIL not compared: {', '.join(left)}")


def _without_key_bias(name: str, value: np.ndarray) -> np.ndarray:
    """Drops the biases of keys: their gradient is zero, so Adam amplifies its noise."""
    if name.endswith("qkv.bias"):
        q, _, v = np.split(value, 3, axis=-1)
        return np.concatenate([q, v], axis=-1)
    if name.endswith("kv.bias"):
        return np.split(value, 2, axis=-1)[1]
    return value


def check_trajectory(_path: Path, data: Data, report: Report) -> None:
    """Losses, gradient norms and parameters over a few AdamW updates."""
    reference = json.loads(str(data["config"]))
    config = make_config(reference)
    objective, variables = load(config, prefixed(data, "sd/"))
    images, noise = jnp.asarray(nhwc(data["imgs"])), jnp.asarray(data["noise"])

    def loss(params, step):
        ids = masking.token_ids(noise[step], objective.counts)
        return objective.masked_loss({**variables, "params": params}, images, ids)[0]

    follow(loss, variables["params"], config, data, report)


def follow(
    loss: Callable, params: Any, config: ConfigDict, data: Data, report: Report
) -> None:
    """Makes the updates of a trajectory, and compares all that it holds.

    Args:
      loss: of parameters and the number of the step.
      config: its `optimizers` and `model` are those of the optimiser.
    """
    reference = json.loads(str(data["config"]))
    rates = jnp.asarray(reference["lr_per_step"])
    tx = optimizers.make_optimizer(config, lambda step: rates[step])
    evaluate = jax.jit(jax.value_and_grad(loss))

    @jax.jit
    def update(gradients, opt_state, params):
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    norm, opt_state = jax.jit(optax.tree.norm), jax.jit(tx.init)(params)
    rounded, rounded_state = params, opt_state
    for step, expected in enumerate(data["losses"]):
        value, gradients = evaluate(params, step)
        report.loss(f"loss {step}", value, expected, allowed=5 * LOSS if step else LOSS)
        if step == len(rates):
            break
        if "grad_norm" in data:
            report.loss(
                f"gradient norm {step}", norm(gradients),
                data["grad_norm"][step], allowed=1e-5,
            )
        params, opt_state = update(gradients, opt_state, params)
        rounded, rounded_state = update(_rounded(gradients), rounded_state, rounded)
        last = step == len(rates) - 1
        roundings = jax.tree.map(lambda a, b: abs(a - b), params, rounded)
        _compare_parameters(params, roundings, data, step, last, report)
    decays = by_their_name(
        optimizers.decay_mask(params, tokens=config.optim.decay_tokens)
    )
    if "decayed" in reference:
        ours = sorted(name for name, decayed in decays.items() if decayed)
        report.exact("decayed tensors", ours, sorted(reference["decayed"]))


def _rounded(gradients: Any) -> Any:
    """Returns gradients that are off by a rounding of the largest of their tensor.

    Where a gradient is the difference of numbers that nearly cancel, it is known no
    better than that, and Adam, which divides it by its own size, makes a step of it.
    """
    half = jnp.finfo(jnp.float32).eps / 2
    return jax.tree.map(lambda g: g + half * abs(g).max(), gradients)


def by_their_name(params: Any) -> dict[str, Any]:
    """Returns the leaves of a tree of parameters under the reference's names."""
    flat = traverse_util.flatten_dict({"params": params}, sep="/")
    return {_their_name(path): leaf for path, leaf in flat.items()}


def _compare_parameters(
    params: Any, roundings: Any, data: Data, step: int, last: bool, report: Report
) -> None:
    """Compares what a file holds of the parameters after a step.

    Args:
      roundings: how far each of them is moved by `_rounded` gradients.
    """
    roundings = by_their_name(roundings)
    for name, ours in by_their_name(params).items():

        def compare(what, theirs):
            ours_there, theirs_there, rounding = (
                _without_key_bias(name, np.asarray(values))
                for values in (ours, ours_of(name, theirs), roundings[name])
            )
            report.output(
                f"{name} {what}", ours_there, theirs_there, TRAJECTORY,
                rounding=rounding,
            )

        if f"steps/{name}" in data:
            compare(f"after update {step}", data[f"steps/{name}"][step])
        if last and f"final/{name}" in data:
            compare("at the end", data[f"final/{name}"])
        if f"sumsq/{name}" in data and not name.endswith("kv.bias"):
            report.loss(
                f"sum of squares of {name} after update {step}",
                (np.asarray(ours, np.float64) ** 2).sum(),
                data[f"sumsq/{name}"][step], allowed=1e-5,
            )
