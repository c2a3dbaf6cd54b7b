"""Parity of TEC (arXiv 2210.11016): the teacher's targets, and the student."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from configs import common
from crossmae_jax import masking
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import tensor
from crossmae_jax.convert.spellings import Row
from crossmae_jax.objectives.pretrain import Pretrain
from tests.parity_files import Data, nhwc
from tests.parity_models import nothing_left_out, prefixed
from tests.parity_report import Report

_LINEARS = {
    "encoder/cls_token_mlp/fc1": "cls_token_mlp.fc1",
    "encoder/cls_token_mlp/fc2": "cls_token_mlp.fc2",
    "fusion/fuse_fcs_{i}": "encoder_adaptor.fuse_fcs.{i}",
    "fusion/adap_mlps_{i}/fc1": "encoder_adaptor.adap_mlps.{i}.fc1",
    "fusion/adap_mlps_{i}/fc2": "encoder_adaptor.adap_mlps.{i}.fc2",
} | {
    f"decoder/{name}": name.replace("/", ".") for name in (
        "forward_fea_decoder/decoder_embed", "forward_fea_decoder/decoder_pred",
        "forward_att_decoder/decoder_embed", "forward_att_decoder/decoder_qk",
    )
}
_NORMS = {
    "fusion/adap_before": "encoder_adaptor.adap_before",
    "fusion/adap_after": "encoder_adaptor.adap_after",
} | {
    f"decoder/{name}/decoder_norm": f"{name}.decoder_norm"
    for name in ("forward_fea_decoder", "forward_att_decoder")
}
_TABLE = (
    *(
        Row(f"{ours}/{kind}", (f"{theirs}.{last}",), layout)
        for rows, weight, matrix in (
            (_LINEARS, "kernel", "matrix"), (_NORMS, "scale", "same")
        )
        for ours, theirs in rows.items()
        for kind, last, layout in (
            (weight, "weight", matrix), ("bias", "bias", "same")
        )
    ),
    *(
        Row(f"decoder/forward_{name}_decoder/mask_token",
            (f"forward_{name}_decoder.mask_token",), "same")
        for name in ("fea", "att")
    ),
    *spellings.MAE,
)


def _to_ours(state: Data, table=_TABLE) -> tuple[dict[str, Any], list[str]]:
    theirs = {name: tensor.of_array(value) for name, value in state.items()}
    return spellings.to_ours(table, theirs)


def _vit(sizes: dict[str, Any]) -> dict[str, Any]:
    size = f"W{sizes['embed_dim']}-D{sizes['depth']}-H{sizes['num_heads']}"
    vit = common.vit(f"{size}/{sizes['patch_size']}")
    return vit | dict(mlp_ratio=float(sizes["mlp_ratio"]))


def _config(reference: dict[str, Any], attention: str, hidden: int) -> ConfigDict:
    student, teacher = reference["student"], reference["teacher"]
    model = common.tec("B/16")
    model["dtype"] = "float32"
    model["encoder"] = _vit(student) | dict(cls_token_mlp=True)
    model["fusion"].update(groups=student["num_adap"], hidden=hidden)
    model["decoder"].update(
        dim=student["decoder_embed_dim"], depth=student["decoder_depth"],
        num_heads=student["decoder_num_heads"], mlp_ratio=float(student["mlp_ratio"]),
    )
    own = (student["pred_dim"], student["pred_num_heads"])
    if own != (teacher["embed_dim"], teacher["num_heads"]):
        raise ValueError("Predictions of another width or other heads than the teacher")
    target = common.teacher("B/16", top_k=teacher["topk"])
    target.update(
        encoder=_vit(teacher), temperature=student["att_tau"], attention=attention
    )
    ratio, side = student["mask_ratio"], student["img_size"]
    channels = student.get("in_chans", 3)
    return ConfigDict(dict(
        model=model, masking=common.masking(mask_ratio=ratio, pred_ratio=ratio),
        loss=common.tec_loss(), target=target,
        data=dict(
            image_size=(side, side) if isinstance(side, int) else tuple(side),
            channels=channels,
            mean=(0.5,) * channels, std=(0.5,) * channels,
        ),
    ))


def _variables(objective: Pretrain, data: Data) -> dict[str, Any]:
    """Returns the weights of the student and, in their collection, the teacher's."""
    like = jax.eval_shape(objective.init, jax.random.key(0))
    teacher, left = _to_ours(prefixed(data, "teacher_sd/"), spellings.TIMM)
    norm = [name for name in teacher if name.startswith("encoder/norm/")]
    for name in norm:  # behind what the features are made of
        del teacher[name]
    own = {"teacher": like.pop("teacher")}
    teacher = names.variables_of(teacher, own, table=spellings.TIMM, left_over=left)
    ours, left = _to_ours(prefixed(data, "sd/"))
    variables = names.variables_of(ours, like, table=_TABLE, left_over=left)
    return jax.tree.map(jnp.asarray, variables | teacher)


def _seen_by_teacher(
    objective: Pretrain, variables: Any, images: Any
) -> dict[str, Any]:
    """Returns what the fixture has of the teacher, and the target of features."""
    feature, attention, rows = objective.target.seen(variables, images)
    target = objective.target(variables, images)
    return dict(
        feature=feature, att=attention, idx=rows,
        class_rank=attention[:, 0].mean(1), normed=target["feature"].values,
    )


def _outputs(objective: Pretrain, variables, images, ids) -> dict[str, Any]:
    """Returns activations under the fixture's names, and the losses."""
    target = objective.target(variables, images)
    asked = {"attention": target["attention"].ids}
    predicted, state = objective.model.apply(
        variables, images, ids, asked, mutable=["intermediates"],
        capture_intermediates=lambda _, method: method == "__call__",
    )
    loss, aux = objective.prediction_loss(predicted, target, ids)
    seen = state["intermediates"]
    encoded = seen["encoder"]["__call__"][0]
    stacked = [*(each.sequence for each in encoded.maps[1:-1]), encoded.last.sequence]
    outputs = {
        "encoder_out": jnp.stack(stacked),
        "adapted": seen["fusion"]["__call__"][0][0].sequence,
        "loss": loss, "loss_fea": aux.metrics["loss_feature"],
        "loss_att": aux.metrics["loss_attention"], "pred_feature": predicted["feature"],
    }
    rows = predicted["attention"].values
    heads = objective.target.groups["attention"]
    outputs["pred_attention"] = rows.reshape(*rows.shape[:2], heads, -1)
    return outputs


def _check_teacher(objective, variables, images, attention, data, report) -> set[str]:
    seen = jax.jit(functools.partial(_seen_by_teacher, objective))(variables, images)
    report.output("teacher/feature", seen["feature"], data["teacher/feature"])
    report.output("target_feature_norm", seen["normed"], data["target_feature_norm"])
    start = f"teacher/{attention}"
    report.exact(f"{start}/idx", seen["idx"], data[f"{start}/idx"])
    for name in ("att", "class_rank"):
        report.output(f"{start}/{name}", seen[name], data[f"{start}/{name}"])
    return {"teacher/feature", "target_feature_norm"} | {
        f"{start}/{name}" for name in ("idx", "att", "class_rank")
    }


def _check_masks(objective, ids, data, report) -> None:
    report.exact(
        "mask", masking.mask_of(ids.pred, num_patches=objective.num_patches),
        data["mask"],
    )
    kept = np.asarray(ids.keep)
    place = np.take_along_axis(data["ids_restore"], kept, axis=1)
    report.exact("ids_restore", place, np.arange(kept.shape[1])[None] + 0 * kept)


def check(_path: Path, data: Data, report: Report) -> None:
    """Both kinds of attention: targets, predictions, losses; gradients of the first."""
    reference = json.loads(str(data["config"]))
    images = jnp.asarray(nhwc(data["imgs"]))
    compared = {"mask", "ids_restore"}
    hidden = len(data["sd/encoder_adaptor.adap_mlps.0.fc1.bias"])
    for attention, prefix in (("scores", ""), ("probs", "probs_variant/")):
        objective = Pretrain(_config(reference, attention, hidden))
        variables = _variables(objective, data)
        ids = masking.token_ids(jnp.asarray(data["noise"]), objective.counts)
        compared |= _check_teacher(
            objective, variables, images, attention, data, report
        )

        def forward(params):
            seen = _outputs(objective, {**variables, "params": params}, images, ids)
            return seen["loss"], seen

        (_, seen), gradients = jax.jit(jax.value_and_grad(forward, has_aux=True))(
            variables["params"]
        )
        # Theirs is of all patches; visible ones are not predicted here.
        pred = seen.pop("pred_feature")
        theirs = np.take_along_axis(
            data["pred_feature"], np.asarray(pred.ids)[:, :, None], axis=1
        )
        report.output("pred_feature", pred.values, theirs)
        compared.add("pred_feature")
        for name, value in seen.items():
            name = prefix + name
            if name not in data:  # does not depend on the kind
                name = name.removeprefix(prefix)
            compare = report.loss if "loss" in name else report.output
            compare(name, value, data[name])
            compared.add(name)
        if not prefix:
            _check_masks(objective, ids, data, report)
            _check_gradients(gradients, data, report)
    nothing_left_out(compared, data, report)


def _check_gradients(gradients, data: Data, report: Report) -> None:
    expected, unknown = _to_ours(prefixed(data, "grad/"))
    gradients = traverse_util.flatten_dict(gradients, sep="/")
    if unknown or expected.keys() != gradients.keys():
        different = sorted(expected.keys() ^ gradients.keys())
        raise ValueError(f"Gradients of other tensors: {unknown}, {different}.")
    for name, theirs in expected.items():
        report.gradient(f"grad/{name}", gradients[name], theirs.read())
