"""Our training step beside that of the PyTorch reference: MAE and CrossMAE.

    git clone https://github.com/TonyLianLong/CrossMAE REFERENCE
    python -m benchmarks.peer --reference=REFERENCE --batch=16 --steps=10 \\
        --override=model.dtype=float32 \\
        --config=configs/vitb_mae.py --config=configs/vitb_cross.py

The reference is the code that CrossMAE's authors published (arXiv 2401.14391), which
contains MAE's as well. It is run from a clone and is no part of this project: its
licence, CC BY-NC 4.0, is its own. Its models are built as the configuration says, and
their numbers of parameters must agree with those that crossmae_jax/cost/counting.py
counts.

Each library's step runs in a process of its own, on the same kind of device, and the
two take turns (benchmarks/turns.py). A step is forward, backward and AdamW. Ours also
draws the masks, normalises the images and takes the norm of the gradients for the log;
of these the reference's step only draws the masks. On a CPU that others use as well,
the time that the processors worked says more than the time that passed, and on one core
most of all (`taskset -c 0` before the command): threads that wait for each other count.

The reference's own autocast is to float16, with a loss scaler; here it is to what the
configuration says, bfloat16 on a GPU, which needs none. Attention is PyTorch's
scaled_dot_product_attention, with the kernels that the reference's training script
allows. With `--compile` the model goes through torch.compile first.
"""

import argparse
import contextlib
import functools
import importlib
import os
import statistics
import sys
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":  # before JAX looks for devices: the peer needs memory, too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from ml_collections import ConfigDict  # noqa: E402

from benchmarks import step as our_step  # noqa: E402
from benchmarks import turns  # noqa: E402
from crossmae_jax.commands import flags  # noqa: E402
from crossmae_jax.cost import counting  # noqa: E402
from crossmae_jax.distributed import environment  # noqa: E402
from crossmae_jax.models import mim  # noqa: E402

FILES = ("models_cross.py", "models_mae.py", "transformer_utils.py")
WARM_UP = 3  # steps; torch.compile may compile again in the second


def check_reference(directory: Path) -> None:
    """Stops the program if a directory is not a clone of the reference."""
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        flags.stop(
            f"--reference={directory} has no {', '.join(missing)}; give a clone of "
            "https://github.com/TonyLianLong/CrossMAE."
        )


def check_config(name: str, config: ConfigDict) -> None:
    """Stops the program at what the reference does not have."""
    if config.objective != "pretrain":
        flags.stop(f"{name} does not pre-train; the reference does nothing else.")
    height, width = config.data.image_size
    model, kinds = mim.build(config), config.loss.kind
    kinds = {kinds} if isinstance(kinds, str) else set(kinds.values())
    reasons = {
        "model.aggregator.kind": bool(model.aggregators),
        "model.fusion.kind": model.fusion.method is not None or (
            model.decoder.gives_visible and model.fusion.used_maps is not None
        ),
        "loss.kind": kinds != {"mse"},
        "target.kind": "normalize" not in config.target,
        "masking.throw_ratio": config.masking.throw_ratio > 0,
        "model.decoder.mlp_ratio": (
            config.model.decoder.mlp_ratio != config.model.encoder.mlp_ratio
        ),
        "masking.noise": config.masking.noise != "uniform",
        "masking.unit": config.masking.unit > 1,
        "masking.rounding": config.masking.rounding != "floor",
        "data.image_size": height != width,
        "optim.accum_steps": config.optim.accum_steps > 1,
        "optim.clip_norm": config.optim.clip_norm is not None,
        "optim.name": config.optim.name != "adamw",
        "optim.decay_tokens": not config.optim.decay_tokens,
        "optim.layer_decay": config.optim.layer_decay != 1,
    }
    wrong = [reason for reason, applies in reasons.items() if applies]
    if wrong:
        flags.stop(
            f"The reference cannot do what {name} asks for with {', '.join(wrong)}; it "
            "has MAE and CrossMAE on square images."
        )


@contextlib.contextmanager
def importable(directory: Path) -> Iterator[None]:
    """Makes the reference's modules importable, and what they take from timm.

    That is two names: stochastic depth, which is 0 in pre-training and then not built,
    and a function that makes a pair of a number. Both stand-ins are ours, so that
    neither timm nor a certain version of it is needed.
    """

    def no_drop_path(rate=0.0):
        raise NotImplementedError(f"Pre-training has no stochastic depth, but {rate=}.")

    timm, timm_layers, helpers = (
        types.ModuleType(name)
        for name in ("timm", "timm.layers", "timm.layers.helpers")
    )
    timm.layers, timm_layers.helpers = timm_layers, helpers
    timm_layers.DropPath = no_drop_path
    helpers.to_2tuple = lambda x: x if isinstance(x, tuple) else (x, x)
    ours = {module.__name__: module for module in (timm, timm_layers, helpers)}
    hidden = {
        name: sys.modules.pop(name) for name in list(sys.modules)
        if name.partition(".")[0] == "timm"
    }
    sys.modules.update(ours)
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in ours:
            del sys.modules[name]
        sys.modules.update(hidden)


def build(config: ConfigDict, directory: Path):
    """Returns the reference's model of a configuration, in PyTorch.

    Raises:
      ValueError: if it does not have as many parameters as ours.
    """
    import torch

    model = mim.build(config)
    encoder, decoder, fusion = model.encoder, model.decoder, config.model.fusion
    is_mae = decoder.gives_visible
    with importable(directory):
        module = importlib.import_module("models_mae" if is_mae else "models_cross")
    options = dict(
        img_size=config.data.image_size[0], patch_size=encoder.patch_size,
        in_chans=config.data.channels, embed_dim=encoder.dim, depth=encoder.depth,
        num_heads=encoder.num_heads, decoder_embed_dim=decoder.dim,
        decoder_depth=decoder.depth, decoder_num_heads=decoder.num_heads,
        mlp_ratio=encoder.mlp_ratio, norm_pix_loss=config.target.normalize,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )
    if not is_mae:
        options |= dict(
            weight_fm=model.fusion.used_maps is not None, use_input=fusion.input,
            use_fm=list(fusion.maps or [-1]), self_attn=decoder.self_attention,
        )
    built = module.MaskedAutoencoderViT(**options)
    num_params = sum(parameter.numel() for parameter in built.parameters())
    expected = counting.count(config).params
    if num_params != expected:
        raise ValueError(
            f"The reference's model has {num_params} parameters, ours {expected}; "
            "another version of the reference, or a difference that this script must "
            "learn."
        )
    return built


def prepare(config: ConfigDict, directory: Path, *, compiled: bool):
    """Builds the reference's model; returns what makes its step, for turns.serve."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    # The reference asks for torch.cuda.amp.autocast() as it runs.
    torch.cuda.amp.autocast = contextlib.nullcontext
    if config.model.dtype == "bfloat16":
        torch.cuda.amp.autocast = functools.partial(
            torch.autocast, device.type, dtype=torch.bfloat16
        )
    torch.manual_seed(config.seed)
    model = build(config, directory).to(device)
    if cuda:  # as the reference's main_pretrain.py does
        torch.backends.cudnn.benchmark = True
        sys.modules["transformer_utils"].handle_flash_attn(
            types.SimpleNamespace(enable_flash_attention2=False)
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1],
             "weight_decay": config.optim.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-4, betas=(config.optim.b1, config.optim.b2), fused=True if cuda else None,
    )
    data, masking = config.data, config.masking
    images = torch.randn(
        data.batch_size, data.channels, *data.image_size, device=device
    )
    run = torch.compile(model) if compiled else model

    def one_step():
        loss = run(
            images, mask_ratio=masking.mask_ratio, kept_mask_ratio=masking.pred_ratio
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if cuda:
            torch.cuda.synchronize()

    def make():
        begin = time.perf_counter()
        for _ in range(WARM_UP):
            one_step()
        return one_step, {
            "platform": "gpu" if cuda else "cpu",
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "compile_seconds": time.perf_counter() - begin,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    return make


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return turns.peak_host_bytes()


# Names of the reference's steps in tables, and what asks a process for each.
THEIRS = {"reference": (), "reference, compiled": ("--compile",)}


def their_player(
    name: str, path: str, overrides: list[str], *, directory: Path
) -> turns.Player:
    """Starts a process with the reference's training step of a configuration."""
    command = [
        sys.executable, "-m", "benchmarks.peer", "--serve", f"--reference={directory}",
        f"--config={path}", *(f"--override={override}" for override in overrides),
    ]
    return turns.Player(name, [*command, *THEIRS[name]])


HEAD = [
    "config", "step", "images/s", "step, ms: median (min..max)", "CPU, ms",
    "first steps, s", "peak memory, GiB", "our speed / theirs", "by CPU time",
]


def cells(
    name: str, player: turns.Player, ours: turns.Player, *, batch: int
) -> list[str]:
    """Returns a line of the table: what was measured, or why it was not."""
    if player.fallen:
        return [name, player.name, player.fallen.replace("|", "/"), *[""] * 6]
    low, high = min(player.seconds) * 1e3, max(player.seconds) * 1e3
    median = statistics.median(player.seconds)
    compared = ["", ""]
    if player is not ours and not ours.fallen:
        compared = [
            f"{turns.ratio(player.seconds, ours.seconds):.2f}",
            f"{turns.ratio(player.cpu_seconds, ours.cpu_seconds):.2f}",
        ]
    return [
        name, player.name, f"{batch / median:.1f}",
        f"{median * 1e3:.1f} ({low:.1f}..{high:.1f})",
        f"{statistics.median(player.cpu_seconds) * 1e3:.1f}",
        f"{player.facts['compile_seconds']:.1f}",
        f"{player.peak_bytes / 2**30:.2f}", *compared,
    ]


def compare(
    path: str, overrides: list[str], *, directory: Path, num_steps: int,
    theirs: Iterable[str],
) -> Iterator[str]:
    """Measures a configuration and yields the lines of a table, ours first.

    Args:
      theirs: names of the reference's steps, of `THEIRS`.

    Raises:
      ValueError: if the two libraries run on different kinds of devices.
    """
    config = our_step.load_config(path, overrides=overrides)
    check_config(path, config)
    with contextlib.ExitStack() as stack:
        players = [stack.enter_context(turns.our_player("ours", path, overrides))]
        players += [
            stack.enter_context(
                their_player(name, path, overrides, directory=directory)
            )
            for name in theirs
        ]
        for player in turns.measured(players, num_steps=num_steps):
            yield our_step.row(cells(
                Path(path).stem, player, players[0], batch=config.data.batch_size
            ))


def main(argv: list[str] | None = None) -> None:
    """Compares the configurations named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", action="append", required=True, metavar="FILE")
    parser.add_argument("--batch", type=int, default=16, help="images a step (16)")
    parser.add_argument("--steps", type=int, default=10, help="steps to time (10)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--compile", action="store_true", help="also through torch.compile"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_reference(args.reference)
    if args.serve:
        config = our_step.load_config(args.config[0], overrides=args.override)
        turns.serve(
            lambda: prepare(config, args.reference, compiled=args.compile), _peak_bytes
        )
        return

    overrides = [f"data.batch_size={args.batch}", *args.override]
    what = f"batch {args.batch}, {args.steps} steps in turns, with the reference"
    print(our_step.conditions(args.override, what))
    print(f"torch {environment.package_version('torch')}\n")
    print(our_step.row(HEAD))
    print(our_step.row(["---"] * len(HEAD)), flush=True)
    for path in args.config:
        for line in compare(
            path, overrides, directory=args.reference, num_steps=args.steps,
            theirs=THEIRS if args.compile else ("reference",),
        ):
            print(line, flush=True)


if __name__ == "__main__":
    main()
