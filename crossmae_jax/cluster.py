"""The processes that train together: how they find each other, and what stops them.

JAX's own runtime connects them (`jax.distributed`). Where they run is found out in this
order:

    by hand      JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    SLURM        a step of several tasks: one a node, or one a GPU
    Cloud TPU    a TPU VM or a pod of GKE; JAX asks the machine itself
    alone        anywhere else

A process that dies takes the others with it: they hear no sign of life for
`heartbeat_seconds`, name it and stop, and the same commands go on from the newest
checkpoint.
"""

import contextlib
import os
import re
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from crossmae_jax import environment

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_GRACE = 10  # seconds in which a verdict arrives after the heartbeats' end


class ClusterError(ValueError):
    """The processes of a run cannot find each other, or were not started alike."""


def join(*, heartbeat_seconds: int = 100) -> None:
    """Connects this process with the others of its run, if it has others.

    To be called before JAX is used for anything else.

    Raises:
      ClusterError: if the environment contradicts itself, or `heartbeat_seconds` is no
        time.
      AcceleratorError: if the processes of a node leave some of its GPUs idle.
    """
    if heartbeat_seconds < 1:
        raise ClusterError(
            f"heartbeat_seconds={heartbeat_seconds}; expected at least 1."
        )
    gpus = _visible_gpus(os.environ, environment.num_gpus())
    arguments = find(os.environ, gpus=gpus, accelerator=environment.find_accelerator())
    if arguments is None or jax.distributed.is_initialized():
        return
    jax.distributed.initialize(
        heartbeat_timeout_seconds=heartbeat_seconds, **arguments
    )
    if jax.default_backend() == "gpu":
        check_gpus(*_used_and_present(os.environ))


def find(
    variables: Mapping[str, str], *, gpus: int, accelerator: tuple[str, str] | None
) -> dict[str, Any] | None:
    """Returns arguments of `jax.distributed.initialize`, None for a process alone.

    Args:
      variables: of the environment.
      gpus: how many this process may see.
      accelerator: what `environment.find_accelerator` found.

    Raises:
      ClusterError: if the variables contradict each other.
    """
    given = [name for name in _BY_HAND if variables.get(name)]
    if given:
        return _by_hand(variables, given)
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1:
        return {
            "num_processes": tasks, "process_id": int(variables["SLURM_PROCID"]),
            "local_device_ids": _slurm_gpus(variables, gpus),
            "cluster_detection_method": "slurm",
        }
    platforms = variables.get("JAX_PLATFORMS", "")
    if accelerator and accelerator[0] == "TPU" and platforms in ("", "tpu"):
        return {}
    return None


def _by_hand(variables, given):
    missing = [name for name in _BY_HAND if name not in given]
    if missing:
        raise ClusterError(
            f"{', '.join(given)} set, but not {', '.join(missing)}; several processes "
            "started by hand need all three, the same address and number and another "
            "id from 0 on in each."
        )
    address, *numbers = (variables[name] for name in _BY_HAND)
    if not all(number.isdecimal() for number in numbers) or not (
        int(numbers[1]) < int(numbers[0])
    ):
        raise ClusterError(
            f"JAX_NUM_PROCESSES={numbers[0]} and JAX_PROCESS_ID={numbers[1]}; expected "
            "whole numbers, ids from 0 to one less than the number."
        )
    if not re.fullmatch(r"\S+:\d+", address):
        raise ClusterError(
            f"JAX_COORDINATOR_ADDRESS={address} must be the host of process 0 and a "
            "free port there, such as 10.0.0.1:9876."
        )
    if numbers[0] == "1":
        return None
    return {
        "coordinator_address": address, "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]), "cluster_detection_method": "deactivate",
    }


def _slurm_gpus(variables: Mapping[str, str], gpus: int) -> list[int] | None:
    """Returns which of the GPUs that it sees a SLURM task takes, None without any.

    JAX itself takes one a task, numbered as the tasks of the node.
    """
    if gpus == 0:
        return None
    tasks, local = _tasks_on_this_node(variables), int(variables["SLURM_LOCALID"])
    if tasks == 1 or gpus == 1:  # all for one, or SLURM shows each task its own
        return list(range(gpus))
    if gpus % tasks:
        raise ClusterError(
            f"{tasks} SLURM tasks on a node see {gpus} GPUs, which cannot be shared "
            f"out equally; use --ntasks-per-node=1 or --ntasks-per-node={gpus}."
        )
    share = gpus // tasks
    return list(range(local * share, (local + 1) * share))


def _tasks_on_this_node(variables: Mapping[str, str]) -> int:
    """Reads SLURM's list of tasks by node, such as "8(x3),4"."""
    counts: list[int] = []
    for part in variables["SLURM_STEP_TASKS_PER_NODE"].split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[int(variables["SLURM_NODEID"])]


def _visible_gpus(variables: Mapping[str, str], present: int) -> int:
    if (listed := variables.get("CUDA_VISIBLE_DEVICES")) is None:
        return present
    return len(list(filter(None, listed.split(","))))


def _used_and_present(variables: Mapping[str, str]) -> tuple[int, int]:
    """Returns how many GPUs JAX uses of how many it should.

    They are those of the node, or of the job on it; if somebody chose among them, those
    that this process may see.
    """
    if allotted := variables.get("SLURM_GPUS_ON_NODE"):
        return _used_on_this_node(), int(allotted)
    present = environment.num_gpus()
    if "CUDA_VISIBLE_DEVICES" in variables:
        return jax.local_device_count(), _visible_gpus(variables, present)
    return _used_on_this_node(), present


def _used_on_this_node() -> int:
    """Returns how many devices the processes of this node have, all together."""
    node = zlib.crc32(socket.gethostname().encode())
    mine = np.array([node, jax.local_device_count()], np.uint32)
    nodes, counts = multihost_utils.process_allgather(mine).reshape(-1, 2).T
    return int(counts[nodes == node].sum())


def check_gpus(used: int, present: int) -> None:
    """Raises AcceleratorError if the processes of a node leave GPUs idle."""
    if used >= present:
        return
    raise environment.AcceleratorError(
        f"node {socket.gethostname()}: {present} GPUs present, JAX uses {used}. Start "
        f"one process for all of them (srun --ntasks-per-node=1) or one for each "
        f"(srun --ntasks-per-node={present}). To leave some out on purpose, ask SLURM "
        "for fewer (--gpus-per-node), or set CUDA_VISIBLE_DEVICES."
    )


def check_same(text: str) -> None:
    """Raises ClusterError unless all processes were started with the same settings.

    Args:
      text: the settings.
    """
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    others = np.flatnonzero(found != found[0]).tolist()
    if others:
        raise ClusterError(
            f"The configuration of host(s) {', '.join(map(str, others))} is not that "
            "of host 0; start the same command, of the same code, on all."
        )


@contextlib.contextmanager
def leaving(heartbeat_seconds: int) -> Iterator[None]:
    """Ends this process without delay if it fails, when it has others.

    Left to itself it would wait for the others, and they for it. Without it they hear
    no sign of life, name it and stop. An exchange fails at once where another process
    is gone, but says only that a connection was closed: then this one stays until the
    runtime, too, has noticed; it prints who died, and ends this process.
    """
    try:
        yield
    except BaseException as error:
        agreed = isinstance(error, SystemExit) and isinstance(error.code, int)
        if agreed or jax.process_count() == 1:
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        text = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and not text.startswith(
            "RESOURCE_EXHAUSTED"
        ):
            wait = heartbeat_seconds + _GRACE
            print(
                f"host {jax.process_index()}: waiting up to {wait} s to learn whether "
                "another process died, and which.", file=sys.stderr, flush=True,
            )
            time.sleep(wait)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
