"""Devices: what their makers say of them, and meshes of some that need not be there.

A target is written "h200:8" (so many GPUs of a node; "h200" is one), "v5e:4x4" (a slice
of TPUs, in a topology that Google sells them in), or "this" (the devices of this
process); "2xh200:8" are two such nodes, "2xv5e:4x4" two such slices. All but "this" are
for compiling only: the makers' compilers run without the devices.

The figures are those of the makers' documents: NVIDIA's data sheets of A100, H100 and
H200 (dense operations; the sheets' own are with sparsity, twice as many), and the pages
"TPU v4", "v5e", "v5p" and "v6e" of the Google Cloud TPU documentation. Links are given
there for both directions together; here for one. Checked against these pages were v5e,
v5p and v6e; the others are from memory and want checking before they decide anything.

JAX is imported inside the functions: what `without_devices` sets is read by the import.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, Any

from crossmae_jax import errors

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them; None where the makers give no figure.

    Attributes:
      tflops: 10^12 dense bfloat16 operations a second, a multiply-add counted as two.
      memory: 10^9 bytes.
      bandwidth: of that memory, 10^9 bytes a second.
      link: 10^9 bytes a second that it can send to the devices next to it.
    """

    tflops: int
    memory: int
    bandwidth: int
    link: int | None


# The first name that stands in JAX's name for a device decides.
DEVICES = {
    "A100-SXM4-80GB": Device(312, 80, 2039, 300),
    "A100 80GB PCIe": Device(312, 80, 1935, 300),
    "A100": Device(312, 40, 1555, 300),
    "H100 PCIe": Device(756, 80, 2000, 300),
    "H100 NVL": Device(835, 94, 3900, 300),
    "H100": Device(989, 80, 3350, 450),
    "H200 NVL": Device(835, 141, 4800, 450),
    "H200": Device(989, 141, 4800, 450),
    "TPU v4": Device(275, 32, 1200, None),
    "TPU v5 lite": Device(197, 16, 819, 200),
    "TPU v5e": Device(197, 16, 819, 200),
    "TPU v5": Device(459, 95, 2765, 600),
    "TPU v6 lite": Device(918, 32, 1638, 400),
    "TPU v6e": Device(918, 32, 1638, 400),
}

# TPUs that can be compiled for: how many axes a topology has, most chips, an example.
_TPUS = {
    "v5e": (2, 256, "v5e:4x4"),
    "v5p": (3, 6144, "v5p:2x2x1"),
    "v6e": (2, 256, "v6e:4x4"),
}

# XLA's description of an H200: the data sheet, and what CUDA reports of its chip. The
# Triton backend of Pallas knows devices by CUDA's whole name for them.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } threads_per_block_limit: 1024
  threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


# How many, of what, in which topology.
_TARGET = re.compile(r"(?:(\d+)x)?(h200|[a-z]\d[a-z]+)(?::(\d+(?:x\d+)*))?")


class MissingCompiler(errors.UserError, RuntimeError):
    """The compiler for a target is not installed."""


def find(device_kind: str) -> Device | None:
    """Returns what is known of a device by JAX's name for it, None if nothing is."""
    for name, device in DEVICES.items():
        if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE):
            return device
    return None


def check_target(target: str) -> None:
    """Checks that a target can be compiled for here; imports no JAX.

    Raises:
      ValueError: if there is no such target.
      MissingCompiler: if its compiler is not installed.
    """
    if target == "this":
        return
    count, kind, sides = _parse(target)
    if count < 1 or 0 in sides:
        raise ValueError(f"target={target!r} has no devices.")
    if kind == "h200":
        if len(sides) != 1:
            raise ValueError(
                f"target={target!r} has {len(sides)} sides; GPUs of a node are a "
                "number, h200:8, and several nodes 2xh200:8."
            )
        plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
        if not any(map(_installed, plugins)):
            raise MissingCompiler(
                f"target={target!r} needs NVIDIA's compiler, which comes with JAX for "
                'GPUs: pip install "jax[cuda13]". No GPU is needed.'
            )
        return
    axes, most, example = _TPUS[kind]
    chips = math.prod(sides)
    if len(sides) != axes or chips > most:
        raise ValueError(
            f"target={target!r} has {len(sides)} sides and {chips} chips; a {kind} "
            f"has {axes} sides and at most {most} chips, such as {example}."
        )
    if not _installed("libtpu"):
        raise MissingCompiler(
            f"target={target!r} needs Google's compiler: pip install libtpu. No TPU is "
            "needed."
        )


def _parse(target: str) -> tuple[int, str, list[int]]:
    """Returns how many of what, and its sides; ValueError if there is no such thing."""
    match = _TARGET.fullmatch(target)
    kind, topology = (match[2], match[3]) if match else ("", None)
    if kind == "h200":
        topology = topology or "1"
    if kind not in ("h200", *_TPUS) or topology is None:
        raise ValueError(
            f"Unknown target {target!r}. Known: this, h200, h200:8, and TPUs such as "
            f"{', '.join(example for _, _, example in _TPUS.values())}; of several "
            "nodes or slices 2xh200:8, 2xv5e:4x4."
        )
    return int(match[1] or 1), kind, [int(side) for side in topology.split("x")]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False


def without_devices() -> None:
    """Keeps JAX from looking for hardware; to be called before JAX is imported.

    Sets environment variables that are not set: JAX itself computes on the CPU, and the
    compilers neither ask a cloud's server what machine this is, nor look for a driver,
    nor wait for a process that holds the TPUs.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Without them the TPU compiler prints that it does not know its host.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    _let_compilers_load()


def _let_compilers_load() -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def target_devices(target: str) -> list["jax.Device"]:
    """Returns the devices of a target, which need not be there.

    Raises:
      ValueError: if there is no such target.
      MissingCompiler: if its compiler is not installed.
    """
    check_target(target)
    import jax
    from jax.experimental import topologies

    if target == "this":
        return jax.devices()
    _let_compilers_load()
    count, kind, sides = _parse(target)
    try:
        if kind == "h200":  # slices, hosts, devices
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="any",
                topology=f"{count}x1x{sides[0]}", target_config=_H200,
            )
        else:
            several = {"num_slices": count} if count > 1 else {}
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, sides))}",
                **several,
            )
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("INVALID_ARGUMENT"):  # the status is in the text
            raise
        raise ValueError(f"The compiler refuses target={target!r}: {error}") from error
    return list(topology.devices)


def compiler_options(target: str, *, optimized: bool = True) -> dict[str, Any]:
    """Returns what `lowered.compile(compiler_options=...)` needs for a target.

    Without a GPU there is no autotuning, for which XLA's own matrix kernels ask.

    Args:
      optimized: False for a program of a TPU that is slow to run and soon compiled. It
        calls the same kernels and collectives.
    """
    if target == "this":
        return {}
    if _parse(target)[1] == "h200":
        return {"xla_gpu_enable_triton_gemm": False}
    return {} if optimized else {"exec_time_optimization_effort": -1.0}


def memory(device: "jax.Device") -> int | None:
    """Returns the bytes of memory of a device, None if they are not known.

    The CPU's are shared out among the devices that JAX makes of it. A device that is
    not in the table above must be one of this process.
    """
    import jax

    if device.platform == "cpu":
        return host_memory() // jax.local_device_count()
    if known := find(device.device_kind):
        return known.memory * 10**9
    return (device.memory_stats() or {}).get("bytes_limit")


def host_memory() -> int:
    """Returns the bytes of memory that this machine or container has."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = "/sys/fs/cgroup/memory.max"
    if os.path.exists(limit):
        with open(limit) as file:
            text = file.read().strip()
        if text != "max":
            total = min(total, int(text))
    return total
