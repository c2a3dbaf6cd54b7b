"""How processes find each other, by what their environment says."""

import pytest

from crossmae_jax import cluster, environment

HAND = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:9876", "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
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
    assert find({"JAX_PLATFORMS": "cpu"}, accelerator=TPU) is None


@pytest.mark.parametrize(("variables", "counted"), [
    ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, (8, 4)),
    ({"CUDA_VISIBLE_DEVICES": "0,3"}, (8, 2)),
    ({}, (8, 16)),
])
def test_gpus_that_count_are_the_jobs_or_the_chosen_or_the_nodes(
    variables, counted, monkeypatch
):
    monkeypatch.setattr(environment, "num_gpus", lambda: 16)
    # The eight fake devices of this process stand for GPUs.
    assert cluster._used_and_present(variables) == counted


def test_a_node_with_idle_gpus_is_an_error_with_the_cure():
    cluster.check_gpus(8, 8)
    with pytest.raises(environment.AcceleratorError) as error:
        cluster.check_gpus(1, 8)
    assert "8 GPUs present, JAX uses 1. Start one process" in str(error.value)
    assert "--ntasks-per-node=8" in str(error.value)


def test_a_heartbeat_of_no_time_is_refused():
    with pytest.raises(ValueError, match="heartbeat_seconds=0; expected at least 1"):
        cluster.join(heartbeat_seconds=0)


def test_one_process_leaves_as_it_would_without():
    for error in (KeyError("a bug"), SystemExit("error: told"), SystemExit(75)):
        with pytest.raises(type(error)) as raised, cluster.leaving(1):
            raise error
        assert raised.value is error
    cluster.check_same("alone")
