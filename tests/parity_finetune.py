"""Parity of fine-tuning and linear probing: classifiers, AdamW by layer, LARS."""

import collections
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crossmae_jax import losses
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.models import vit
from crossmae_jax.models.classifier import Classifier
from crossmae_jax.optim import layerwise, optimizers
from tests.parity_files import Data, nhwc
from tests.parity_models import (
    by_their_name,
    compare_gradients,
    follow,
    nothing_left_out,
    optimizer,
    prefixed,
)
from tests.parity_report import Report


def make_classifier(ctor: dict[str, Any], **changes: Any) -> Classifier:
    """Makes the classifier of a fixture's constructor arguments."""
    return Classifier(
        encoder=vit.ViT(
            size=_size(ctor), image_size=(ctor["img_size"],) * 2,
            mlp_ratio=ctor["mlp_ratio"], final_norm=not ctor["global_pool"],
            learned_positions=True, remat="none",
            drop_path=ctor["drop_path_rate"],
        ),
        pool="mean" if ctor["global_pool"] else "cls",
        num_classes=ctor["num_classes"], **changes,
    )


def _size(ctor: dict[str, Any]) -> str:
    shape = f"W{ctor['embed_dim']}-D{ctor['depth']}-H{ctor['num_heads']}"
    return f"{shape}/{ctor['patch_size']}"


def _load(model: Classifier, images: jax.Array, state: Data) -> Any:
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.tree.map(jnp.asarray, _read(state, like))


def _read(state: Data, like: Any) -> Any:
    theirs = {name: tensor.of_array(value) for name, value in state.items()}
    ours, left_over = spellings.to_ours(spellings.TIMM, theirs)
    return names.variables_of(ours, like, table=spellings.TIMM, left_over=left_over)


def _loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return losses.cross_entropy(logits, targets).mean()


def check_classifier(_path: Path, data: Data, report: Report) -> None:
    """Activations, the losses of fine-tuning, and gradients of two of them."""
    reference = json.loads(str(data["config"]))
    model = make_classifier(reference["ctor"])
    images = jnp.asarray(nhwc(data["imgs"]))
    variables = _load(model, images, prefixed(data, "sd/"))
    found, state = model.apply(
        variables, images, mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, vit.ViT),
    )
    maps = state["intermediates"]["encoder"]["__call__"][0].maps[1:]
    outputs = {
        "tokens": found.tokens.sequence,
        "block_out": jnp.stack([tokens.sequence for tokens in maps]),
        "pre_logits": found.features, "logits": found.logits,
    }
    for name, ours in outputs.items():
        report.output(name, ours, data[name])
    labels, num_classes = jnp.asarray(data["labels"]), reference["ctor"]["num_classes"]
    smooth, hard = (
        losses.smooth_labels(labels, num_classes=num_classes, smoothing=smoothing)
        for smoothing in (reference["label_smoothing"], 0.0)
    )
    soft = jnp.asarray(data["soft_targets"])
    targets = {
        "loss": smooth, "loss_label_smoothing": smooth, "loss_soft_target": soft,
        "loss_ce": hard,
    }
    for name, target in targets.items():
        report.loss(name, _loss(found.logits, target), data[name])

    @jax.jit
    def gradient(target):
        return jax.grad(
            lambda p: _loss(model.apply({"params": p}, images).logits, target)
        )(variables["params"])

    compare_gradients("grad/", gradient(smooth), data, report)
    compare_gradients("grad_soft/", gradient(soft), data, report)
    nothing_left_out(outputs.keys() | targets.keys(), data, report)


def check_trajectory(_path: Path, data: Data, report: Report) -> None:
    """Fine-tuning's AdamW: rates by layer, tokens exempt from decay, clipping."""
    reference = json.loads(str(data["config"]))
    ctor = reference["ctor"]
    model = make_classifier(ctor)
    images = jnp.asarray(nhwc(data["imgs"]))
    variables = _load(model, images, prefixed(data, "sd/"))
    config = ConfigDict(dict(
        model=dict(
            encoder=dict(kind="vit", size=_size(ctor)), remat="none", dtype="float32"
        ),
        data=dict(image_size=(ctor["img_size"],) * 2, channels=images.shape[-1]),
        optim=optimizer(reference, decay_tokens=False),
    ))
    target = losses.smooth_labels(
        jnp.asarray(data["labels"]), num_classes=ctor["num_classes"],
        smoothing=reference["label_smoothing"],
    )
    follow(
        lambda p, step: _loss(model.apply({"params": p}, images).logits, target),
        variables["params"], config, data, report,
    )
    scales = by_their_name(layerwise.lr_scales(
        variables["params"], decay=reference["layer_decay"], depth=ctor["depth"]
    ))
    for name, theirs in reference["lr_scale"].items():
        report.loss(f"factor of the rate of {name}", scales.pop(name), theirs)
    report.exact("parameters without a factor", len(scales), 0)


def check_linear_probe(_path: Path, data: Data, report: Report) -> None:
    """Batch norm and linear head over batches of features, then in evaluation."""
    reference = json.loads(str(data["config"]))
    num_batches, _, dim = data["feats"].shape
    model = make_classifier(
        dict(
            embed_dim=dim, depth=1, num_heads=1, patch_size=1, img_size=1,
            mlp_ratio=1.0, drop_path_rate=0.0, global_pool=False,
            num_classes=data["eval_logits"].shape[1],
        ),
        head_norm="batch",
    )
    feats, labels = jnp.asarray(data["feats"]), jnp.asarray(data["labels"])
    fresh = model.init(jax.random.key(0), feats[0], train=True, method="classify")
    state = prefixed(data, "sd/")  # the head is part 1 of a sequence, the norm part 0
    state = {name.replace("head.1.", "head."): value for name, value in state.items()}
    variables = {**fresh, **_read(state, {"params": fresh["params"]})}
    constants = model.bind(variables).batch_norm
    report.exact("epsilon", constants.epsilon, reference["bn_eps"])
    report.exact("momentum", constants.momentum, reference["bn_momentum"])

    @jax.jit
    def evaluate(variables, feats, labels):
        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params}, feats, train=True,
                method="classify", mutable=["batch_stats"],
            )
            target = losses.smooth_labels(
                labels, num_classes=logits.shape[1], smoothing=0.0
            )
            return _loss(logits, target), (logits, updated)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    total = jax.tree.map(jnp.zeros_like, variables["params"])
    for i in range(num_batches):
        (loss, (logits, updated)), gradient = evaluate(variables, feats[i], labels[i])
        variables |= updated
        total = jax.tree.map(jnp.add, total, gradient)
        report.output(f"logits of batch {i}", logits, data["train_logits"][i])
        report.loss(f"loss of batch {i}", loss, data["train_loss"][i])
        for name in ("mean", "var"):
            report.output(
                f"running {name} after batch {i}",
                variables["batch_stats"]["batch_norm"][name],
                data[f"running_{name}"][i],
            )
    head = {
        name.replace("head.1.", "head."): value for name, value in data.items()
    }
    compare_gradients("grad_sum/", total, head, report)
    logits = model.apply(variables, jnp.asarray(data["eval_feats"]), method="classify")
    report.output("eval_logits", logits, data["eval_logits"])
    nothing_left_out(
        {"feats", "eval_feats", "train_logits", "train_loss", "running_mean",
         "running_var", "eval_logits"},
        data, report,
    )


def check_lars(_path: Path, data: Data, report: Report) -> None:
    """Parameters after every update with given gradients, and the last momenta."""
    reference = json.loads(str(data["config"]))
    config = ConfigDict(dict(optim=optimizer(
        reference, name="lars", b1=reference["momentum"],
        trust_coefficient=reference.get("trust_coefficient", 0.001),
    )))
    rates = jnp.asarray(reference["lr_per_step"])
    tx = optimizers.make_optimizer(config, lambda step: rates[step])
    params = jax.tree.map(jnp.asarray, prefixed(data, "init/"))
    gradients = prefixed(data, "grad/")
    report.exact("parameters", sorted(params), sorted(reference["param_names"]))

    @jax.jit
    def update(gradients, opt_state, params):
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(tx.init)(params)
    for step in range(len(rates)):
        now = {name: gradient[step] for name, gradient in gradients.items()}
        params, opt_state = update(now, opt_state, params)
        for name, ours in params.items():
            theirs = data[f"params/{name}"][step]
            report.output(f"{name} after update {step}", ours, theirs)
    for name, ours in optax.tree.get(opt_state, "trace").items():
        report.gradient(f"momentum of {name}", ours, data[f"momentum/{name}"])
    nothing_left_out((), data, report)


# The references' words for the sizes in `vit.SIZES`.
_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}


@functools.cache
def _published(name: str, *, pooled: bool) -> tuple[Any, int]:
    """Makes the classifier that the references call such as vit_large_patch16.

    Returns the shapes of its parameters, and the number of its blocks.
    """
    size = re.fullmatch(rf"vit_({'|'.join(_SIZES)})_patch(\d+)", name)
    if size is None:
        raise ValueError(
            f"Unknown model {name!r}. Known: vit_SIZE_patchN with SIZE one of "
            f"{', '.join(_SIZES)}."
        )
    shape, patch_size = vit.SIZES[_SIZES[size[1]]], int(size[2])
    model = make_classifier(dict(
        embed_dim=shape.dim, depth=shape.depth, num_heads=shape.num_heads,
        patch_size=patch_size, img_size=16 * patch_size, mlp_ratio=4.0,
        drop_path_rate=0.0, global_pool=pooled, num_classes=1000,
    ))
    images = jnp.zeros((1, *model.encoder.image_size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"], shape.depth


def check_layer_decay(cases: list[dict], report: Report) -> None:
    """Factor of the rate and weight decay of every parameter of published models."""
    for case in cases:
        params, depth = _published(case["model"], pooled=case["global_pool"])
        what = f"{case['model']}, decay {case['layer_decay']}"
        report.exact(f"{what}, depth", depth, case["depth"])
        scales = by_their_name(layerwise.lr_scales(
            params, decay=case["layer_decay"], depth=depth
        ))
        decays = by_their_name(optimizers.decay_mask(params, tokens=False))
        report.exact(f"{what}, names", sorted(scales), sorted(case["params"]))
        for name, theirs in case["params"].items():
            report.loss(f"{what}, rate of {name}", scales[name], theirs["lr_scale"])
            report.exact(
                f"{what}, weight decay of {name}",
                case["weight_decay"] * decays[name], theirs["weight_decay"],
            )
        # In digits, not places: 0.65 ^ 33, of a ViT-H's tokens, is below a millionth.
        groups = collections.Counter(
            (f"{scales[name]:.9g}", case["weight_decay"] * decays[name])
            for name in scales
        )
        theirs = collections.Counter()
        for group in case["groups_in_order"]:
            factor = f"{group['lr_scale']:.9g}"
            theirs[factor, group["weight_decay"]] += group["n_params"]
        report.exact(
            f"{what}, groups", sorted(map(str, groups.items())),
            sorted(map(str, theirs.items())),
        )
