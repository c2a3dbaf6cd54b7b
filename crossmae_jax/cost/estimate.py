"""What the training step needs of hardware that need not be there.

The step that training runs is compiled for the target and read, not run:

* Memory and collectives are those of the compiled program.
* Operations are counted (crossmae_jax/cost/counting.py): 3 forward passes, 2 a
  multiply-add.
* The time is a bound, no measurement: a step takes at least as long as its operations
  at the device's peak, and as what it must send at the bandwidth of the links. The
  third side of the roofline, memory accesses at the memory's bandwidth, is given beside
  it and not in it: the compiler's count has accesses that never leave the chip. The
  count of operations is a few per cent above what runs (crossmae_jax/cost/counting.py).

It fits if the memory that the compiler reserves stays within what JAX may use; what
else lives on a device (the runtime, a second batch on its way, fragments) is not in the
program, and the shares of `capacity` leave room for it.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from crossmae_jax import errors, objectives, train_step
from crossmae_jax.cost import collectives, counting
from crossmae_jax.data import pipeline
from crossmae_jax.distributed import hardware, parallel, sharding
from crossmae_jax.optim import optimizers

_FUSED = {"cuDNN": "__cudnn$fmha", "TPU kernels": "tpu_custom_call"}
_PREALLOCATED = 0.75  # of a GPU's memory: JAX, "GPU memory allocation"
_MOST_PREALLOCATED = 0.95  # leaves CUDA and its libraries a twentieth
# How far the memory of a program that is soon compiled may be from that of the one that
# training runs: 12 % less and 4 % more were found (docs/performance.md).
_UNLIKE = 0.15


class Capacity(NamedTuple):
    """Memory of a device in bytes: within `sure` it fits, beyond `most` it does not.

    Attributes:
      why: what `sure` is.
      between: what holds, or is to be done, for a program between the two.
    """

    sure: int
    most: int
    why: str
    between: str = ""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that the compiler reserves on one device.

    Attributes:
      moments: of the optimiser, with the step counters.
      temporaries: activations kept for the backward pass, gradients, work space.
      other: what is added as arrays are laid out, results beside the new state, code.
    """

    weights: int
    moments: int
    images: int
    temporaries: int
    other: int

    @property
    def state(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.moments + self.other

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.images + self.temporaries


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one configuration needs of one target.

    Attributes:
      layout: how weights and moments lie on the devices, in a line.
      fsdp: how many devices share a copy of them.
      memory: None if the compiler refused, and then also `accessed`.
      refusal: the compiler's own words, "" if it did not refuse.
      capacity: None where the memory of the device is not known.
      attention: implementations that the program calls: cuDNN, TPU kernels, or XLA's.
      flops: of a step on one device, counted.
      accessed: bytes of memory that the compiler counts for a step on one device; None
        where it does not say.
      optimized: the compiler made the program that training runs, and not one that
        is sooner compiled.
    """

    target: str
    device_kind: str
    num_devices: int
    layout: str
    device: hardware.Device | None
    capacity: Capacity | None
    batch_size: int
    accum_steps: int
    seconds: float
    flops: float
    fsdp: int = 1
    refusal: str = ""
    memory: Memory | None = None
    accessed: float | None = None
    optimized: bool = True
    attention: str = ""
    exchanged: tuple[collectives.Collective, ...] = ()

    @property
    def fits(self) -> str:
        """Returns "yes", "barely", "no", or "unknown" without a capacity.

        "unsure" near the capacity, where the program is not that which training runs.
        """
        if self.refusal:
            return "no"
        if self.capacity is None:
            return "unknown"
        share = self.memory.total / self.capacity.sure
        if not self.optimized and abs(share - 1) < _UNLIKE:
            return "unsure"
        if self.memory.total <= self.capacity.sure:
            return "yes"
        return "barely" if self.memory.total <= self.capacity.most else "no"

    @property
    def sent(self) -> float:
        """Bytes that a device must send at least in a step."""
        return sum((kind.sent for kind in self.exchanged), 0.0)

    def roofline(self) -> dict[str, float]:
        """Returns the seconds of a step by "operations", "links" and "memory".

        Those of which no figures are known are left out. "memory" is no bound: some of
        the accesses that the compiler counts may stay on the chip.
        """
        if self.device is None:
            return {}
        seconds = {"operations": self.flops / (self.device.tflops * 1e12)}
        if self.device.link is not None and self.sent:
            seconds["links"] = self.sent / (self.device.link * 1e9)
        if self.accessed is not None:
            seconds["memory"] = self.accessed / (self.device.bandwidth * 1e9)
        return seconds


class LargestBatch(NamedTuple):
    """The largest global batch that fits, on a line through two that were compiled."""

    batch_size: int
    compiled: tuple[int, int]


def capacity(target: str, device: hardware.Device | None, here: Any) -> Capacity | None:
    """Returns the memory of a target's devices, None if it is not known.

    Args:
      here: one of the devices, which tells how much it has if it is there.
    """
    if target == "this" and here.platform == "cpu":
        memory = hardware.memory(here)
        return Capacity(memory, memory, (
            "this machine's memory, whoever uses it, over "
            f"{jax.local_device_count()} devices"
        ))
    if target == "this" and (limit := (here.memory_stats() or {}).get("bytes_limit")):
        return Capacity(limit, limit, "what JAX may use of this device")
    if device is None:
        return None
    memory = device.memory * 10**9
    if here.platform == "tpu":
        return Capacity(
            memory, device.memory * 2**30, "the data sheet's GB",
            "the compiler takes it, for the chip has GiB, but nothing is left for the "
            "runtime",
        )
    return Capacity(
        int(_PREALLOCATED * memory), int(_MOST_PREALLOCATED * memory),
        f"the {_PREALLOCATED:.0%} of {device.memory} GB that JAX takes by itself",
        "only if JAX may take more: "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={_MOST_PREALLOCATED}",
    )


def with_settings(config: ConfigDict, settings: dict[str, Any]) -> ConfigDict:
    """Returns a copy in which some settings, named "a.b", have other values."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    return changed


def _num_bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one of the devices that it lies on."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


class Lowered(NamedTuple):
    """A step as it goes to the compiler, and the shapes of what it takes.

    Attributes:
      layout: how the state lies, in a line.
      fsdp: how many devices share a copy of it.
    """

    step: jax.stages.Lowered
    state: Any
    batch: Any
    layout: str
    fsdp: int


def lower_step(config: ConfigDict, devices: Sequence[jax.Device]) -> Lowered:
    """Returns the step that training runs on such devices, lowered for them.

    Raises:
      SetupError: if the configuration contradicts itself, or does not divide over the
        devices.
    """
    data, accum_steps = config.data, config.optim.accum_steps
    key = jax.random.key(config.seed, impl="threefry2x32")
    with errors.setting_up():
        objective = objectives.make(config)
        parallel.check_batch_size(
            data.batch_size, len(devices), accum_steps=accum_steps
        )
        # Only the lengths of schedules depend on the data set, and no shape on those.
        schedule = optimizers.make_schedule(config, steps_per_epoch=1000.0)
        tx = optimizers.make_optimizer(config, schedule)
        state = train_step.abstract_state(objective, tx, key)
        mesh, line = sharding.make_mesh(config, state, devices)
    _, step = train_step.compile_steps(
        objective, tx, mesh, schedule=schedule, key=key, accum_steps=accum_steps,
        log_norms=config.log_norms,
        max_skipped_in_a_row=config.optim.max_skipped_in_a_row,
    )
    batch = pipeline.blank_batch(data, batch_size=data.batch_size)
    state = parallel.with_sharding(state, sharding.shardings(mesh, state))
    batch = parallel.with_sharding(batch, parallel.batch_sharding(mesh))
    fsdp = mesh.shape[parallel.FSDP_AXIS]
    return Lowered(step.lower(state, batch), state, batch, line, fsdp)


def _memory(compiled: Any, state: Any, batch: Any) -> Memory:
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise errors.SetupError(
            "The program does not say what memory it needs, because it was compiled "
            "before and read from JAX's cache; set JAX_ENABLE_COMPILATION_CACHE=false."
        )
    temporaries = sizes.temp_size_in_bytes
    total = (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes + sizes.generated_code_size_in_bytes + temporaries
    )
    weights = _num_bytes(state.variables)
    moments = _num_bytes((state.opt_state, state.step))
    images = _num_bytes(batch)
    return Memory(
        weights, moments, images, temporaries,
        other=total - weights - moments - images - temporaries,
    )


def estimate(
    config: ConfigDict, target: str, *, optimized: bool = False
) -> Estimate:
    """Compiles a configuration's training step for a target; returns what it needs.

    Args:
      optimized: of a TPU, compile what training runs. Otherwise the compiler takes
        little trouble to make the program fast; its memory is about the same, and
        near the capacity `fits` is "unsure".

    Example:
      estimate(configs.vitb_cross.get_config(), "v5e:4x4").memory.total

    Raises:
      SetupError: if there is no such target, or the configuration contradicts itself or
        does not divide over the target's devices; if a program that was read from the
        cache of compiled ones does not say what memory it needs, as on some GPUs.
      MissingCompiler: if the compiler for the target is not installed.
    """
    with errors.setting_up():
        devices = hardware.target_devices(target)
    here, num_devices = devices[0], len(devices)
    device = hardware.find(here.device_kind)
    begin = time.perf_counter()
    lowered = lower_step(config, devices)
    # Only of some targets is there a program that is sooner compiled.
    options = hardware.compiler_options(target, optimized=optimized)
    optimized = options == hardware.compiler_options(target)
    refusal, compiled = "", None
    try:
        compiled = lowered.step.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler refuses what does not fit. The status is part of the text.
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        refusal = str(error)
    result = Estimate(
        target=target, device_kind=here.device_kind, num_devices=num_devices,
        layout=lowered.layout, fsdp=lowered.fsdp, optimized=optimized,
        device=device, capacity=capacity(target, device, here),
        batch_size=config.data.batch_size, accum_steps=config.optim.accum_steps,
        seconds=time.perf_counter() - begin, refusal=refusal,
        flops=counting.count(config).train_flops * config.data.batch_size / num_devices,
    )
    if compiled is None:
        return result
    text = compiled.as_text()
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return dataclasses.replace(
        result,
        memory=_memory(compiled, lowered.state, lowered.batch),
        # The compiler counts a loop's body once, and micro-batches are a loop.
        accessed=accessed if optimized and config.optim.accum_steps == 1 else None,
        attention=", ".join(n for n, call in _FUSED.items() if call in text) or "XLA",
        exchanged=tuple(collectives.read(text, num_devices)),
    )


def largest_batch(estimates: list[Estimate]) -> LargestBatch | None:
    """Returns the largest batch that surely fits; None if it cannot be told.

    Memory is taken to grow in proportion to the batch. It takes two batch sizes, that
    the compiler did not refuse; of more, the two nearest to the device's memory count.
    """
    known = {each.batch_size: each for each in estimates if each.memory}
    if len(known) < 2 or estimates[0].capacity is None:
        return None
    room = estimates[0].capacity.sure
    nearest = sorted(known.values(), key=lambda x: abs(x.memory.total - room))[:2]
    small, large = sorted(nearest, key=lambda x: x.batch_size)
    slope = (large.memory.total - small.memory.total) / (
        large.batch_size - small.batch_size
    )
    if slope <= 0:
        return None
    most = small.batch_size + (room - small.memory.total) / slope
    unit = small.num_devices * small.accum_steps
    return LargestBatch(
        max(0, int(most // unit * unit)), (small.batch_size, large.batch_size)
    )
