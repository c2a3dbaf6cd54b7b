"""How processes find each other, by what their environment says."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from crossmae_jax.distributed import cluster, environment

HAND = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:9876", "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
TPU = ("TPU", "/dev/accel*")


def find(variables, *, gpus=0, accelerator=None):
    return cluster.find(variables, gpus=gpus, accelerator=accelerator)


def test_a_process_with_nothing_around_it_is_alone():
    assert find({}) is None
    assert find({}, gpus=8, accelerator=("NVIDIA GPU", "driver 580")) is None
    assert find(HAND | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    # The batch script of a job, or a shell in it, is no step of several tasks.
    assert find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None


def test_by_hand_comes_before_everything_else():
    assert find(HAND | SLURM, gpus=8, accelerator=TPU) == {
        "coordinator_address": "10.0.0.1:9876", "num_processes": 4, "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(("changes", "text"), [
    ({"JAX_PROCESS_ID": ""}, "set, but not JAX_PROCESS_ID; several processes"),
    ({"JAX_PROCESS_ID": "4"}, "expected whole numbers, ids from 0 to one less"),
    ({"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES=many and JAX_PROCESS_ID=3"),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "and a free port there, such as"),
])
def test_by_hand_and_wrong_says_what_is_wrong(changes, text):
    with pytest.raises(ValueError, match=text):
        find(HAND | changes)


@pytest.mark.parametrize(("changes", "gpus", "taken"), [
    ({}, 0, None),  # no GPU at all
    ({}, 8, [4, 5, 6, 7]),  # two tasks a node share all
    ({"SLURM_STEP_TASKS_PER_NODE": "1,4,2", "SLURM_NODEID": "1"}, 4, [1]),
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x6)", "SLURM_LOCALID": "0"}, 4, [0, 1, 2, 3]),
    ({}, 1, [0]),  # SLURM shows each task one, and each time it is the first
])
def test_slurm_tasks_share_out_the_gpus_that_they_see(changes, gpus, taken):
    assert find(SLURM | changes, gpus=gpus) == {
        "num_processes": 6, "process_id": 5, "local_device_ids": taken,
        "cluster_detection_method": "slurm",
    }


def test_slurm_tasks_that_cannot_share_are_told():
    with pytest.raises(ValueError, match="2 SLURM tasks on a node see 3 GPUs.*=3"):
        find(SLURM, gpus=3)


def test_on_a_tpu_jax_is_asked_unless_another_platform_was():
    assert find({}, accelerator=TPU) == {}
    assert find({"JAX_PLATFORMS": "tpu"}, accelerator=TPU) == {}
    assert find({"JAX_PLATFORMS": "tpu,cpu"}, accelerator=TPU) == {}
    assert find({"JAX_PLATFORMS": "cpu,tpu"}, accelerator=TPU) is None


def test_slurm_variables_that_did_not_arrive_are_named():
    given = {name: SLURM[name] for name in SLURM if name != "SLURM_PROCID"}
    with pytest.raises(cluster.ClusterError, match="6 SLURM tasks, but SLURM_PROCID"):
        find(given)


@pytest.mark.parametrize(("listed", "count"), [
    (None, 8), ("", 0), ("0,1,2", 3), ("GPU-8f1a-22,GPU-9b", 2), ("-1", 0), (" ", 0),
    ("0,-1,1", 1), ("NoDevFiles", 0), ("MIG-a,MIG-b", 1), ("3", 1),
])
def test_gpus_are_those_that_cuda_would_show(listed, count):
    variables = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert cluster.visible_gpus(variables, 8) == count


def devices(*rows):
    """Rows of: number of the node, devices of the process, GPUs of the node."""
    cluster.check_devices(*np.array(rows, np.uint32).T)


def test_gpus_of_a_node_may_be_shared_out_in_any_way():
    devices([1, 8, 8], [2, 8, 8])  # one process a node
    devices(*[[1, 1, 8]] * 8)  # one a GPU, and each sees all
    devices(*[[1, 1, 1]] * 4)  # one a GPU, and each sees its own
    devices([1, 4, 0], [2, 4, 0])  # no GPUs


def test_a_node_with_idle_gpus_is_an_error_with_the_cure():
    with pytest.raises(environment.AcceleratorError) as error:
        devices([1, 8, 8], [2, 1, 8], [2, 1, 8])
    assert "process(es) 1, 2 has 8 GPUs, of which JAX uses 2. Start" in str(error.value)
    assert "--ntasks-per-node=8" in str(error.value)


def test_hosts_with_fewer_devices_are_named():
    with pytest.raises(cluster.ClusterError, match="Process 2 has 7 devices.*0 has 8"):
        devices([1, 8, 8], [2, 8, 8], [3, 7, 7])


def test_idle_gpus_of_a_process_alone_are_an_error(monkeypatch):
    monkeypatch.setattr(environment, "num_gpus", lambda: 16)
    monkeypatch.setattr(environment, "find_accelerator", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # The eight fake devices of this process stand for GPUs.
    with pytest.raises(environment.AcceleratorError, match="16 GPUs, of which JAX use"):
        cluster.join()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    cluster.join()


def test_a_tpu_that_knows_no_hosts_is_alone_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(environment, "find_accelerator", lambda: TPU)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    cluster.join()  # without libtpu: what is installed is checked elsewhere
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        jax.distributed, "initialize", Raising("coordinator_address should be defined.")
    )
    cluster.join()
    assert "goes on alone. If there are others, set JAX_CO" in capsys.readouterr().err
    monkeypatch.setattr(os, "environ", dict(HAND))
    with pytest.raises(cluster.ClusterError, match="cannot connect the processes: co"):
        cluster.join()


class Raising:
    def __init__(self, text):
        self.text = text

    def __call__(self, **arguments):
        raise ValueError(self.text)


def test_a_heartbeat_of_no_time_is_refused():
    with pytest.raises(ValueError, match="heartbeat_seconds=0; expected at least 1"):
        cluster.join(heartbeat_seconds=0)


def test_one_process_leaves_as_it_would_without():
    for error in (KeyError("a bug"), SystemExit("error: told"), SystemExit(75)):
        with pytest.raises(type(error)) as raised, cluster.leaving(1):
            raise error
        assert raised.value is error
    cluster.check_same("alone")
    cluster.check_shared(Path("nowhere"))
