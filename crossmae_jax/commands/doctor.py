"""Checks this machine: versions, devices, disk, memory, and one real training step.

    python -m crossmae_jax doctor

Exit status 2 if the command line is wrong, 1 if the machine is, with what to do about
it.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from crossmae_jax import train_step
from crossmae_jax.commands import flags, session

_GIB = 2**30


def _config(batch_size: int):
    """Returns a tiny CrossMAE with every part of a big one."""
    from ml_collections import ConfigDict

    from crossmae_jax.runs import settings

    return ConfigDict(settings.completed(dict(
        model=dict(
            encoder=dict(kind="vit", size="W64-D1-H2/8"),
            fusion=dict(kind="inter_block"),
            decoder=dict(kind="cross", dim=32, depth=1, num_heads=2),
            aggregator=dict(kind="conv"),
            remat="selective", dtype="bfloat16",
        ),
        masking=dict(
            mask_ratio=0.75, pred_ratio=0.75, throw_ratio=0.5, retain="furthest"
        ),
        target=dict(normalize=True),
        optim=dict(weight_decay=0.05, b1=0.9, b2=0.95, clip_norm=1.0),
        data=dict(
            image_size=(32, 32), channels=3, mean=(0.5,) * 3, std=(0.25,) * 3,
            batch_size=batch_size,
        ),
    )))


def _train_one_step() -> str:
    """Trains on noise for a step over all devices; returns what happened.

    Raises:
      RuntimeError: if the step fails or its loss is not a number.
    """
    import jax
    import numpy as np

    from crossmae_jax.distributed import parallel
    from crossmae_jax.objectives import pretrain
    from crossmae_jax.optim import optimizers

    mesh = parallel.make_mesh()
    config = _config(4 * mesh.size)
    objective = pretrain.Pretrain(config)
    def schedule(step):
        return jax.numpy.float32(1e-3)

    tx = optimizers.make_optimizer(config, schedule)
    key = jax.random.key(0, impl="threefry2x32")
    init, step = train_step.compile_steps(
        objective, tx, mesh, schedule=schedule, key=key
    )
    state = init(key)
    size = config.data.batch_size // jax.process_count()
    first = size * jax.process_index()
    noise = np.random.default_rng(jax.process_index())
    batch = parallel.place_batch(mesh, {
        "image": noise.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8),
        "label": np.zeros(size, np.int32),
        "sample": np.arange(first, first + size, dtype=np.uint32),
    })
    begin = time.perf_counter()
    state, logged = step(state, batch)
    loss = float(logged["loss"])
    compiling = time.perf_counter() - begin
    begin = time.perf_counter()
    state, logged = step(state, batch)
    second = float(logged["loss"])
    took = time.perf_counter() - begin
    if not (np.isfinite(loss) and np.isfinite(second)):
        raise RuntimeError(f"the loss is not finite: {loss}, then {second}")
    return (
        f"ok: loss {loss:.3f}, then {second:.3f}; {compiling:.1f} s with compiling, "
        f"then {took * 1e3:.1f} ms"
    )


def _memory(root: Path = Path("/")) -> str:
    """Returns free and total memory, and the limit of the container if it has one."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{total / _GIB:.1f} GiB"
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        rows = dict(row.split(":") for row in meminfo.read_text().splitlines())
        available = int(rows["MemAvailable"].split()[0]) * 1024
        text = f"{available / _GIB:.1f} GiB available of {text}"
    limit = root / "sys/fs/cgroup/memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        text += f"; this container may use {int(limit.read_text()) / _GIB:.1f} GiB"
    return text


def _device_memory(device) -> str:
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return f", {limit / _GIB:.1f} GiB for JAX" if limit else ""


@session.command()
def main(argv: Sequence[str]) -> int:
    """Prints what it finds; returns 1 if something is wrong."""
    flags.parse("doctor", argv, {}, doc=__doc__)
    problems = []
    try:
        import jax

        from crossmae_jax.distributed import environment, parallel
    except (ImportError, RuntimeError) as error:  # jax and jaxlib that do not fit
        print(f"PROBLEM: a package cannot be imported: {error}. Install again: "
              "pip install -e . in the project's directory.")
        return 1

    print("versions")
    for name, version in environment.versions().items():
        print(f"  {name:20} {version or 'not installed'}")
        if version is None:
            problems.append(f"{name} is not installed: pip install {name}")
    print("devices")
    try:
        print("  ", end="")
        parallel.announce()
    except RuntimeError as error:
        print(f"\nPROBLEM: JAX finds no device to run on: {error}\nJAX_PLATFORMS="
              f"{os.environ.get('JAX_PLATFORMS', '')!r}; unset it, or install the "
              "plugin of the platform it names.")
        return 1
    for device in jax.local_devices():
        print(f"  {device.id}: {device.device_kind}{_device_memory(device)}")
    try:
        print(f"  {environment.check_accelerator()}")
    except environment.AcceleratorError as error:
        problems.append(str(error))
    print("machine")
    disk = shutil.disk_usage(Path.cwd())
    print(f"  disk    {disk.free / _GIB:.1f} GiB free of {disk.total / _GIB:.1f} GiB "
          f"at {Path.cwd()}")
    print(f"  memory  {_memory()}")
    print(f"  cpus    {os.cpu_count()}")
    print("training step", flush=True)
    try:
        print(f"  {_train_one_step()}")
    except (ImportError, RuntimeError) as error:
        problems.append(f"The training step failed: {type(error).__name__}: {error}")

    for problem in problems:
        print(f"PROBLEM: {problem}")
    if not problems:
        print("All is well.")
    return 1 if problems else 0
