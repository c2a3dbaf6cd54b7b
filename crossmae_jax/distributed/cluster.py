"""The processes that train together: how they find each other, and what stops them.

JAX's own runtime connects them (`jax.distributed`). Where they run is found out in this
order:

    by hand      JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    SLURM        a step of several tasks: one a node, or one a GPU
    Cloud TPU    a TPU VM or a pod of GKE; JAX asks the machine itself
    alone        anywhere else

A process that dies takes the others with it: they hear no sign of life for
`heartbeat_seconds`, name it and stop, and the same commands go on from the newest
checkpoint. Process 0 is whom they ask: if it is the one that died, the others say that
they lost the coordination service.
"""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from crossmae_jax import errors
from crossmae_jax.distributed import environment

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = (
    "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE",
)
_GRACE = 10  # seconds in which a verdict arrives after the heartbeats' end
# How the runtime's errors begin where another process may be the reason. They are not
# always JaxRuntimeErrors.
_LOST = re.compile(
    r"(error: )?(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)"
)


class ClusterError(errors.UserError, ValueError):
    """The processes of a run cannot find each other, or were not started alike."""


def join(*, heartbeat_seconds: int = 100, agree_to_stop: bool = True) -> None:
    """Connects this process with the others of its command, if it has others.

    To be called before JAX is used for anything else.

    Args:
      agree_to_stop: whether SIGTERM is left to JAX's runtime, see `preemption`; else
        it ends a process as usual.

    Raises:
      ClusterError: if the environment contradicts itself, or the processes differ in
        their numbers of devices.
      AcceleratorError: if the processes of a node leave some of its GPUs idle.
    """
    if heartbeat_seconds < 1:
        raise ClusterError(
            f"heartbeat_seconds={heartbeat_seconds}; expected at least 1."
        )
    if jax.distributed.is_initialized():
        return
    present = environment.num_gpus()
    accelerator = environment.find_accelerator()
    arguments = find(
        os.environ, gpus=visible_gpus(os.environ, present), accelerator=accelerator
    )
    if arguments is not None:
        jax.config.update("jax_enable_preemption_service", agree_to_stop)
        if "num_processes" in arguments:
            print(
                f"waiting for {arguments['num_processes']} processes, of which this is "
                f"{arguments['process_id']}, at "
                f"{arguments.get('coordinator_address', 'the first node of the step')}",
                file=sys.stderr, flush=True,
            )
        _initialize(heartbeat_seconds, arguments)
        if jax.distributed.is_initialized() and jax.process_count() == 1:
            # There is nobody to agree with: Python's own handlers shall hear it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if present or jax.distributed.is_initialized():
        check_devices(*_devices_of_all())


def _initialize(heartbeat_seconds: int, arguments: dict[str, Any]) -> None:
    if not arguments and importlib.util.find_spec("libtpu") is None:
        return  # environment.check_accelerator says so, and what to do
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=heartbeat_seconds, **arguments
        )
    except ValueError as error:
        if arguments:
            raise ClusterError(f"JAX cannot connect the processes: {error}") from error
        print(
            "This machine has a TPU and does not say of which hosts it is one, so this "
            f"process goes on alone. If there are others, set {', '.join(_BY_HAND)}.",
            file=sys.stderr, flush=True,
        )


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
        if missing := [name for name in _SLURM if not variables.get(name)]:
            raise ClusterError(
                f"This is one of {tasks} SLURM tasks, but {', '.join(missing)} not set;"
                " hand all SLURM_* variables on to the program, or start it by srun."
            )
        return {
            "num_processes": tasks, "process_id": int(variables["SLURM_PROCID"]),
            "local_device_ids": _slurm_gpus(variables, gpus),
            "cluster_detection_method": "slurm",
        }
    platform = variables.get("JAX_PLATFORMS", "").split(",")[0]
    if accelerator and accelerator[0] == "TPU" and platform in ("", "tpu"):
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
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[int(variables["SLURM_NODEID"])]


def visible_gpus(variables: Mapping[str, str], present: int) -> int:
    """Returns how many of the GPUs present a process may see.

    CUDA_VISIBLE_DEVICES lists them up to the first that is none, such as -1; of parts
    of GPUs (MIG) a process gets one.
    """
    if (listed := variables.get("CUDA_VISIBLE_DEVICES")) is None:
        return present
    count = 0
    for name in map(str.strip, listed.split(",")):
        if name.startswith("MIG-"):
            return 1
        if not re.fullmatch(r"\d+|GPU-[\w-]+", name):
            break
        count += 1
    return count


def _devices_of_all() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each process a number of its node, its devices, and its GPUs.

    The GPUs are those that the processes of its node should use together. Every process
    calls it, whatever it has.
    """
    variables, gpus = os.environ, 0
    if jax.default_backend() == "gpu":
        gpus = visible_gpus(variables, environment.num_gpus())
        gpus = int(variables.get("SLURM_GPUS_ON_NODE") or gpus)
    node = zlib.crc32(socket.gethostname().encode())
    mine = np.array([node, jax.local_device_count(), gpus], np.uint32)
    if jax.process_count() == 1:
        return tuple(mine[:, None])
    return tuple(multihost_utils.process_allgather(mine).reshape(-1, 3).T)


def check_devices(nodes: np.ndarray, counts: np.ndarray, gpus: np.ndarray) -> None:
    """Checks that no GPU is left out and all processes have equally many devices.

    Args:
      nodes: of each process a number of its node; likewise its devices, and the GPUs
        that the processes of its node should use together.

    Raises:
      AcceleratorError: if the processes of a node leave GPUs idle.
      ClusterError: if some processes have more devices than others.
    """
    for node in np.unique(nodes):
        here = nodes == node
        used, present = int(counts[here].sum()), int(gpus[here].max())
        if used < present:
            hosts = ", ".join(map(str, np.flatnonzero(here)))
            raise environment.AcceleratorError(
                f"The node of process(es) {hosts} has {present} GPUs, of which JAX "
                f"uses {used}. Start one process for all of them (srun "
                f"--ntasks-per-node=1) or one for each (srun --ntasks-per-node="
                f"{present}). To leave some out on purpose, ask SLURM for fewer "
                "(--gpus-per-node), or set CUDA_VISIBLE_DEVICES, the same number "
                "everywhere."
            )
    others = np.flatnonzero(counts != counts[0])
    if len(others):
        raise ClusterError(
            f"Process {others[0]} has {counts[others[0]]} devices, process 0 has "
            f"{counts[0]}; a batch is cut equally, so leave out the same number on "
            "every host, or repair the one that has fewer."
        )


def check_same(text: str) -> None:
    """Raises ClusterError unless all processes were started with the same settings.

    Args:
      text: the settings.
    """
    if jax.process_count() == 1:
        return
    if not jax.distributed.is_initialized():
        raise ClusterError(
            f"This is one of {jax.process_count()} processes that JAX's runtime does "
            "not connect; call distributed.cluster.join() before JAX is used."
        )
    digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    others = np.flatnonzero(digests != digests[0]).tolist()
    if others:
        raise ClusterError(
            f"The configuration of host(s) {', '.join(map(str, others))} is not that "
            "of host 0; start the same command, of the same code, on all."
        )


def check_shared(path: Path) -> None:
    """Raises ClusterError unless all processes see what process 0 has written."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(f"crossmae_jax: {path.name} is written")
    sights = multihost_utils.process_allgather(np.uint32(path.exists()))
    blind = np.flatnonzero(sights == 0).tolist()
    if blind:
        raise ClusterError(
            f"Host(s) {', '.join(map(str, blind))} do not see {path}, which host 0 has "
            "written; give a --workdir on a disk that all hosts share."
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
        alone = not jax.distributed.is_initialized() or jax.process_count() == 1
        if agreed or alone:
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        if is_lost(error):
            wait = heartbeat_seconds + _GRACE
            print(
                f"host {jax.process_index()}: waiting up to {wait} s to learn whether "
                "another process died, and which.", file=sys.stderr, flush=True,
            )
            time.sleep(wait)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def is_lost(error: BaseException) -> bool:
    """Says whether the end of another process may be the reason of an error."""
    return _LOST.match(str(error)) is not None
