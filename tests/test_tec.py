"""TEC: a frozen teacher's features and attention, an adapter, a decoder run twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

import crossmae_jax
from configs import common, digits_tec, finetune_digits
from crossmae_jax import convert, errors, train, train_step
from crossmae_jax.checkpoints import checkpointer, steps
from crossmae_jax.convert import opening, starting
from crossmae_jax.convert.names import ConversionError
from crossmae_jax.distributed import parallel, sharding
from crossmae_jax.evals import of_checkpoint
from crossmae_jax.objectives.classify import Classify
from crossmae_jax.objectives.pretrain import Pretrain
from crossmae_jax.optim import optimizers
from crossmae_jax.tokens import CLASS_TOKEN
from tests import drawn, tiny
from tests.saved_runs import save_run
from tests.test_models import make_config

GOLDEN = Path(__file__).parent / "golden"
NUM = 24  # patches, 4 x 6
TEACHER = "W16-D2-H2/4"  # of the runs
PLAIN = dict(masking__throw_ratio=0.5)
PRMIM = PLAIN | dict(masking__retain="furthest", model__aggregator__kind="conv")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "sample": jnp.arange(2, dtype=jnp.uint32)}


def tec(**changes):
    """Returns a small config on 4 x 6 patches; `a__b=c` sets config.a.b."""
    config = make_config()
    model = common.tec("W16-D4-H2/4", decoder_dim=8, decoder_heads=2, groups=2)
    config.model = model | dict(dtype="float32", remat="none")
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.teacher("W12-D3-H3/4", top_k=5)
    config.loss = common.tec_loss()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def made(**changes):
    """Returns an objective, and variables for it."""
    objective = Pretrain(tec(**changes))
    return objective, drawn.variables(objective.init)


def test_a_row_of_attention_is_a_distribution_of_each_head():
    objective, variables = made()
    target = jax.jit(objective.target)(variables, objective.normalize(BATCH))
    rows = target["attention"]
    assert rows.values.shape == (2, 6, 3 * NUM)
    assert (rows.ids[:, 0] == CLASS_TOKEN).all()
    np.testing.assert_allclose(rows.values.reshape(2, 6, 3, NUM).sum(-1), 1, rtol=1e-5)
    # The class token's, which is the first row, is largest at the others' patches.
    softened = objective.target.temperature * np.log(rows.values[:, 0])
    scores = softened.reshape(2, 3, NUM)
    scores = (scores - scores.mean(-1, keepdims=True)).mean(1)
    chosen = np.argsort(-scores, axis=1)[:, :5]
    assert [set(x) for x in chosen] == [set(x) for x in np.asarray(rows.ids[:, 1:])]
    feature = np.asarray(target["feature"].values)
    assert feature.shape == (2, NUM, 12)
    np.testing.assert_allclose(feature.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(feature.std(1, ddof=1), 1, rtol=1e-2)


@pytest.mark.parametrize("changes", [
    dict(target__attention="probs"), dict(target__blocks=1),
    dict(target__temperature=1.0), dict(target__top_k=3),
    dict(target__encoder__relative_bias="shared", target__encoder__positions="none"),
])
def test_what_the_papers_leave_open_is_an_option(changes):
    usual, variables = made()
    other, others = made(**changes)
    images = usual.normalize(BATCH)
    before, after = (
        objective.target(found, images)
        for objective, found in ((usual, variables), (other, others))
    )
    name = "feature" if "target__blocks" in changes else "attention"
    pair = before[name].values, after[name].values
    assert pair[0].shape != pair[1].shape or not np.allclose(*pair, atol=1e-6)
    assert np.isfinite(pair[1]).all()


@pytest.mark.parametrize(
    "changes", [{}, PLAIN, PRMIM], ids=["TEC", "plain throwing", "PR-MIM"]
)
def test_both_passes_are_learnt_from_and_the_teacher_is_not_trained(changes):
    objective, variables = made(**changes)

    def loss(variables):
        value, aux = objective.loss(variables, BATCH, jax.random.key(1))
        return value, aux.metrics

    (value, logged), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables
    )
    parts = logged["loss_feature"] + logged["loss_attention"]
    np.testing.assert_allclose(value, parts, rtol=1e-6)
    # The trivial predictor attends to all patches alike.
    assert logged["loss_trivial"] > np.log(NUM)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients["params"]):
        assert jnp.isfinite(gradient).all() and gradient.any(), path
    assert not any(x.any() for x in jax.tree.leaves(gradients["teacher"]))
    aggregators = {x for x in gradients["params"] if x.startswith("aggregator")}
    expected = {"aggregator_feature", "aggregator_attention"}
    assert aggregators == (expected if objective.model.aggregators else set())
    assert ("loss_thrown" in logged) == bool(aggregators)


def test_attention_of_thrown_patches_comes_from_the_aggregator():
    objective, variables = made(**PRMIM)
    images, key = objective.normalize(BATCH), jax.random.key(1)
    ids = objective.sample(key, BATCH)
    asked = {"attention": jnp.concatenate([ids.thrown[:, :2], ids.keep[:, :2]], 1)}
    predict = jax.jit(objective.model.apply)
    before = predict(variables, images, ids, asked)["attention"]
    assert before.values.shape == (2, 4, 3 * NUM)
    conv = variables["params"]["aggregator_attention"]["mixer"]
    conv["kernel"] = conv["kernel"] + 1.0
    after = predict(variables, images, ids, asked)["attention"]
    moved = np.abs(after.values - before.values).reshape(2, 4, 3, NUM).max((0, 2))
    shown = np.asarray(ids.keep[0])
    assert (moved[:2] > 1e-4).all(), "all keys of a thrown patch's row"
    # A visible patch's own row and keys do not hang on it.
    assert np.abs((after.values - before.values).reshape(2, 4, 3, NUM)[0, 2:])[
        ..., shown
    ].max() == 0


def test_every_block_reaches_the_decoder_and_the_mlp_makes_the_class_token():
    objective, variables = made()
    ids = objective.sample(jax.random.key(1), BATCH)
    images, predict = objective.normalize(BATCH), jax.jit(objective.model.apply)
    before = predict(variables, images, ids)["feature"].values
    tables = {
        "fusion": ("fuse_fcs_0", "kernel"), "encoder": ("cls_token_mlp", "fc1", "bias"),
        "decoder": ("forward_fea_decoder", "mask_token"),
    }
    for part, path in tables.items():
        changed = jax.tree.map(lambda x: x, variables)
        *parents, leaf = path
        node = changed["params"][part]
        for parent in parents:
            node = node[parent]
        node[leaf] = node[leaf] + jnp.linspace(0, 1, node[leaf].size).reshape(
            node[leaf].shape
        )
        after = predict(changed, images, ids)["feature"].values
        assert np.abs(after - before).max() > 1e-5, part


@pytest.mark.parametrize("changes, message", [
    (dict(model__decoder__kind="mae"), "This decoder predicts one target, but"),
    (dict(target=dict(kind="pixels", normalize=True)),
     "TEC's decoder predicts feature and attention of a teacher, but that of config.t"),
    (dict(target__encoder__size="W12-D3-H3/8"), "The teacher has 2x3 patches, of tar"),
    (dict(target__encoder__size="W12-D3-H5/4"), "width 12 does not divide into 5"),
    (dict(target__encoder__kind="cnn"), "Unknown encoder.kind 'cnn'. Known: swin, vit"),
    (dict(target__encoder__drop_path=0.5), "er.drop_path=0.5 does nothing in a"),
    (dict(target__encoder__mask_tokens=True), "mask_tokens=True does nothing in"),
    (dict(target__top_k=25), "target.top_k=25, but there are 24 in the teacher"),
    (dict(target__top_k=0), "config.target.top_k=0 must be 1 or more"),
    (dict(target__blocks=4), "target.blocks=4, but there are 3 in the teacher"),
    (dict(target__temperature=0.0), "config.target.temperature=0.0 must be above 0"),
    (dict(target__attention="logits"), "Unknown target.attention 'logits'. Known: sc"),
    (dict(model__fusion__groups=3), "fusion.groups=3 does not divide the encoder's 4"),
    (dict(model__fusion__hidden=0), "config.model.fusion.hidden=0 must be 1 or more"),
    (dict(loss__kind=dict(feature="mse")), "Unknown loss.kind None of attention"),
])
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        if "target" in changes:
            config = tec()
            config.target = changes["target"]
        elif "loss__kind" in changes:
            config = tec()
            config.loss = common.tec_loss() | {"kind": changes["loss__kind"]}
        else:
            config = tec(**changes)
        Pretrain(config)


def test_a_swin_neither_teaches_nor_learns_from_a_teacher():
    config = tec()
    config.target.encoder = common.swin("W12-D1.1-H3.3/2", window=2)
    with pytest.raises(ValueError, match="class token, which target.encoder.kind='swi"):
        Pretrain(config)
    config = tec()
    config.model.encoder = common.swin("W16-D1.1-H2.2/2", window=2)
    with pytest.raises(ValueError, match="no fusion brings them together; set config"):
        Pretrain(config)


def test_the_teacher_is_no_part_of_the_optimiser_and_lies_as_other_weights_do():
    config = tec()
    with config.unlocked():
        config.optim = common.pretrain(epochs=1.0, warmup_epochs=0.0).optim
        config.epochs, config.data.batch_size = 1.0, 8
    objective = Pretrain(config)
    schedule = optimizers.make_schedule(config, steps_per_epoch=10.0)
    tx = optimizers.make_optimizer(config, schedule)
    state = train_step.abstract_state(objective, tx, jax.random.key(0))
    assert "teacher" not in str(jax.tree_util.tree_leaves_with_path(state.opt_state))
    mesh = parallel.make_mesh(fsdp=2)
    lie = sharding.shardings(mesh, state).variables
    cut = jax.sharding.PartitionSpec(parallel.FSDP_AXIS)
    for collection in ("params", "teacher"):
        block = lie[collection]["encoder"]["blocks_1"]
        assert block["attn"]["qkv"]["kernel"].spec == cut
        assert block["norm1"]["scale"].spec == jax.sharding.PartitionSpec()

    init, step = train_step.compile_steps(
        objective, tx, mesh, schedule=schedule, key=jax.random.key(0),
        max_skipped_in_a_row=5,
    )
    images = np.random.default_rng(1).integers(0, 256, (8, 16, 24, 3), np.uint8)
    batch = {"image": images, "sample": np.arange(8, dtype=np.uint32)}
    first = init(jax.random.key(2))
    before = jax.tree.map(np.asarray, first.variables)
    last, _ = step(first, parallel.place_batch(mesh, batch))
    tiny.assert_same_bits(before["teacher"], last.variables["teacher"])
    moved = last.variables["params"]["encoder"]["blocks_1"]["mlp"]["fc1"]["kernel"]
    assert (np.asarray(moved) != (
        before["params"]["encoder"]["blocks_1"]["mlp"]["fc1"]["kernel"]
    )).any()


def _renamed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def _files(folder):
    """Yields files of a ViT, some with more in them, and its size."""
    for kind in ("mae", "crossmae", "encoder_only", "finetuned"):
        yield GOLDEN / f"ckpt_{kind}.pth", "W16-D2-H2/8"
    yield GOLDEN / "timm_vit_tiny_like.safetensors", "W36-D3-H3/16"
    # As DINO and iBOT release a teacher.
    state = torch.load(GOLDEN / "ckpt_encoder_only.pth", weights_only=True)
    state = state.get("model", state)
    for name, content in {
        "ibot.pth": {"state_dict": state},
        "dino.pth": {"teacher": _renamed(state, "module.backbone.")},
    }.items():
        torch.save(content, folder / name)
        yield folder / name, "W16-D2-H2/8"


def begun_with(path, size):
    """Returns a file's weights, drawn variables, and what these shall begin with."""
    heads, patch_size = size.split("-H")[1].split("/")
    weights = opening.open_weights(
        str(path), parts="encoder",
        fallback=opening.Facts(num_heads=int(heads), decoder_heads=1),
    )
    config = tec(
        target__weights=str(path), target__encoder__size=size, target__top_k=3,
        target__encoder__mlp_ratio=float(weights.card.model["encoder"]["mlp_ratio"]),
        model__encoder__size=f"W16-D4-H2/{patch_size}",
        data__image_size=tuple(weights.card.image_size),
    )
    with config.unlocked():
        config.init_from = config.init_channels = ""
    objective = Pretrain(config)
    variables = jax.jit(objective.init)(jax.random.key(0))
    start, = starting.plan_all(objective.starts, variables, config)
    return weights, variables, start


def test_a_teacher_may_be_of_any_vit_that_can_be_read(tmp_path):
    for path, size in _files(tmp_path):
        weights, variables, start = begun_with(path, size)
        after, read = start.apply(variables), weights.tensors
        tiny.assert_same_bits(after["params"], variables["params"])
        for name, value in traverse_util.flatten_dict(
            after["teacher"], sep="/"
        ).items():
            np.testing.assert_array_equal(value, read[name].read(), err_msg=name)


def test_what_lies_beside_a_teacher_in_its_file_is_to_be_left_out_first(tmp_path):
    state = torch.load(GOLDEN / "ckpt_encoder_only.pth", weights_only=True)
    state = _renamed(state.get("model", state), "backbone.")
    torch.save(
        {"teacher": state | {"head.mlp.0.weight": torch.zeros(3, 3)}},
        tmp_path / "dino.pth",
    )
    config = tec(target__weights=str(tmp_path / "dino.pth"))
    with config.unlocked():
        config.init_from = config.init_channels = ""
    objective = Pretrain(config)
    variables = jax.eval_shape(objective.init, jax.random.key(0))
    with pytest.raises(ConversionError) as error:
        starting.plan_all(objective.starts, variables, config)
    assert str(error.value).startswith(f"config.target.weights={tmp_path}/dino.pth: ")
    assert "convert import" in str(error.value)
    assert "--under=teacher.backbone --num_heads=3 --to=NEW" in str(error.value)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An MAE of the digits, as a run has saved it."""
    return save_run(
        tmp_path_factory.mktemp("teacher") / "run", "digits_mae",
        "data.image_size=(16, 16)", f"model.encoder.size={TEACHER}",
    )


def settings(digits_dir, teacher, **more):
    """Returns the settings of a run of 30 steps, by name."""
    return tiny.TINY | {
        "data.data_dir": digits_dir, "target.weights": str(teacher),
        "target.encoder.size": TEACHER, "target.top_k": 3,
        "model.fusion.groups": 2, "model.fusion.hidden": 64, "epochs": 2.0,
    } | more


def run_config(digits_dir, teacher, **more):
    config = digits_tec.get_config()
    config.update_from_flattened_dict(settings(digits_dir, teacher, **more))
    config.evals = common.knn(every_epochs=0.0) | dict(linear=dict(every_epochs=0.0))
    return config


@pytest.fixture(scope="module")
def run(digits_dir, teacher, tmp_path_factory):
    """A run of 30 steps, which nothing interrupts."""
    directory = tmp_path_factory.mktemp("tec") / "run"
    train.run(run_config(digits_dir, teacher), directory)
    return directory


def state_of(workdir):
    step = checkpointer.newest_step(workdir / "checkpoints")
    return checkpointer.restore_arrays(workdir / "checkpoints", step)


def test_a_run_is_evaluated_loaded_and_exported_without_its_teacher(
    run, teacher, tmp_path, digits_dir
):
    results = json.loads((run / "results.json").read_text())
    assert 0 < results["eval/knn/top1"] <= 1 and 0 < results["eval/linear/top1"] <= 1
    logged = set().union(*tiny.lines(run))
    assert {"train/loss_feature", "train/loss_attention"} <= logged
    taught = opening.open_weights(str(teacher), parts="encoder").tensors
    saved = state_of(run)
    for name in [name for name in saved if "teacher" in name]:
        assert name.startswith("variables/teacher/encoder/"), "nothing of the optimiser"
        inner = name.removeprefix("variables/teacher/")
        np.testing.assert_array_equal(saved[name], taught[inner].read(), err_msg=name)

    images = np.zeros((2, 16, 16, 1), np.uint8)
    model = crossmae_jax.load(run)
    features = model.encode(images)
    assert features.shape == (2, 16) and set(model.variables) == {"constants", "params"}
    assert model.card.parts == ["encoder", "fusion", "decoder"]
    assert model.attention_maps(images, part="encoder") is not None
    for ask, message in (
        (model.reconstruct, "predicts teacher, of which there are no pictures"),
        (model.targets, "predicts feature in 4x4 cells, attention in 4x4 cells"),
        (model.attention_maps, "a decoder for each of feature, attention"),
        (lambda _: model.inter_block_weights(), "has an adapter between encoder and"),
    ):
        with pytest.raises(ConversionError, match=message):
            ask(images)

    whole, plain = tmp_path / "whole.safetensors", tmp_path / "plain"
    convert.export_weights(run, whole, format="safetensors")
    done = convert.export_weights(run, plain, format="timm")
    folded = "folded: the MLP of the class token"
    assert any(line.startswith(folded) for line in done.lines)
    for path in (whole, plain):
        found = crossmae_jax.load(path, mean=(0.305,), std=(0.376,))
        np.testing.assert_allclose(found.encode(images), features, atol=1e-5)
        assert not any("teacher" in name for name in opening.open_weights(
            str(path)
        ).tensors)
    with pytest.raises(ConversionError, match="predicts teacher, which the format mae"):
        convert.export_weights(run, tmp_path / "mae.pth", format="mae")

    config = run_config(digits_dir, teacher)
    for path in (run, whole):
        opened = of_checkpoint.open_checkpoint(path, config)
        batch = {"image": jnp.asarray(images)}
        given = opened.objective.outputs["features"](opened.variables, batch)
        np.testing.assert_allclose(given, features, atol=1e-5)


def test_fine_tuning_starts_from_its_encoder_and_class_token(run):
    config = finetune_digits.get_config()
    config.update_from_flattened_dict({
        "model.encoder.size": "W16-D2-H2/4", "data.num_classes": 10,
        "data.image_size": (16, 16), "init_from": str(run), "model.pool": "cls",
    })
    like = jax.eval_shape(Classify(config).init, jax.random.key(0))
    plan = starting.plan(str(run), like, config)
    assert plan.new == {"head"}
    assert any("the class token as its MLP makes it" in line for line in plan.report)
    token = plan.tensors["encoder/cls_token"].read()
    saved = {
        name.removeprefix("variables/params/encoder/"): value
        for name, value in state_of(run).items()
    }
    x = saved["cls_token"]
    for layer in ("fc1", "fc2"):
        x = x @ saved[f"cls_token_mlp/{layer}/kernel"] + (
            saved[f"cls_token_mlp/{layer}/bias"]
        )
        x = np.asarray(jax.nn.gelu(x, approximate=False)) if layer == "fc1" else x
    np.testing.assert_allclose(token, x, atol=1e-6)


def test_a_run_that_is_killed_goes_on_without_the_teachers_file(
    run, teacher, digits_dir, tmp_path
):
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    workdir = tmp_path / "run"
    process = start(digits_dir, moved, workdir)
    while not steps.committed(workdir / "checkpoints"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(moved)
    process = start(digits_dir, moved, workdir)
    said = process.communicate()[0]
    assert process.returncode == 0 and "RESUMED at step " in said, said
    assert "FRESH START" not in said and "weights from" not in said
    ours, theirs = state_of(workdir), state_of(run)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    # A run that has nothing yet needs it, and says so before it computes anything.
    process = start(digits_dir, moved, tmp_path / "new")
    said = process.communicate()[0]
    assert process.returncode == 1, said
    error = f"error: config.target.weights={moved}: No weights at {moved}; give a file"
    assert said.splitlines()[0].startswith(error)


@pytest.mark.parametrize("more, message", [
    ({"target.weights": ""}, "config.target.weights is not set, and without these we"),
    ({"target.encoder.size": "W24-D2-H2/4"},
     "The weights do not fit the model.(.|\n)*The model of these weights is what con"),
])
def test_a_run_without_a_fitting_teacher_is_refused(
    more, message, digits_dir, teacher, tmp_path
):
    with pytest.raises(errors.UserError, match=message):
        train.run(run_config(digits_dir, teacher, **more), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def start(digits_dir, teacher, workdir):
    """Starts such a run in a process of its own."""
    flags = [
        f"--config.{name}={value}"
        for name, value in settings(digits_dir, teacher).items()
    ]
    environment = dict(
        os.environ, JAX_PLATFORMS="cpu", JAX_DEFAULT_MATMUL_PRECISION="highest"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "crossmae_jax.main", "--config=configs/digits_tec.py",
         f"--workdir={workdir}", "--config.log_every_steps=1", *flags],
        cwd=GOLDEN.parents[1], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
