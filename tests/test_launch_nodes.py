"""Launchers for SLURM, GPU machines and GKE, against programs that answer as told."""

import os
import shlex
import signal
import subprocess

import pytest

from tests import launch_stubs
from tests.launch_stubs import TRAINING

PROGRAM = f"python -m crossmae_jax.main {' '.join(TRAINING)}"
STEPS = f"srun --kill-on-bad-exit=0 --wait=300 {PROGRAM}"


@pytest.fixture
def slurm(tmp_path):
    """A SLURM job."""
    stubs = launch_stubs.Stubs(tmp_path / "stubs", "srun", "scontrol", "python")
    stubs.environment["SLURM_JOB_ID"] = "123"
    return stubs


@pytest.mark.parametrize("status", [0, 1, 137])
def test_slurm_passes_the_status_of_the_steps_on(slurm, status):
    slurm.answer("srun", "*", (status, "host 0/2"))
    ended = slurm.run("slurm.sbatch", *TRAINING)
    assert ended.status == status and ended.out == "host 0/2\n"
    assert slurm.calls() == [STEPS]


def test_slurm_queues_a_job_again_that_was_told_to_save(slurm):
    slurm.answer("srun", "*", (75, ""))
    assert slurm.run("slurm.sbatch", *TRAINING).status == 75
    assert slurm.calls() == [STEPS, "scontrol requeue 123"]


def test_slurm_says_when_it_cannot_be_queued_again(slurm):
    slurm.answer("srun", "*", (75, ""))
    slurm.answer("scontrol", "*", (1, ""))
    ended = slurm.run("slurm.sbatch", *TRAINING)
    assert ended.status == 2 and "job 123 could not be queued again" in ended.err


def test_slurm_hands_the_cpus_of_a_task_to_the_steps(slurm):
    slurm.environment["SLURM_CPUS_PER_TASK"] = "8"
    assert slurm.run("slurm.sbatch", *TRAINING).status == 0
    assert slurm.calls() == [STEPS.replace(" python", " --cpus-per-task=8 python")]


def test_slurm_signals_the_steps_and_queues_again():
    options = {
        line.removeprefix("#SBATCH ")
        for line in (launch_stubs.LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    }
    # With B: the signal would go to the script alone, and nothing would be saved.
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= options


WRONG_FOR_SLURM = {
    "--config is missing": [],
    "--workdir is missing": TRAINING[:1],
    "--nodes=2 is not a flag of the training": ["--nodes=2", *TRAINING],
    "there is no SLURM_JOB_ID": TRAINING,
}


@pytest.mark.parametrize("message", WRONG_FOR_SLURM)
def test_wrong_flags_for_slurm_end_with_what_to_do(slurm, message):
    del slurm.environment["SLURM_JOB_ID"]
    ended = slurm.run("slurm.sbatch", *WRONG_FOR_SLURM[message])
    assert ended.status == 2 and ended.err.startswith(f"slurm.sbatch: {message}")
    assert not slurm.calls()


# One machine with GPUs.

EIGHT = "\\n".join(f"GPU {index}: NVIDIA H100" for index in range(8))


@pytest.fixture
def machine(tmp_path):
    """A machine with eight GPUs."""
    stubs = launch_stubs.Stubs(tmp_path / "stubs", "python", "nvidia-smi", "ssh")
    stubs.answer("nvidia-smi", "--list-gpus", (0, EIGHT))
    return stubs


@pytest.mark.parametrize("statuses, ran", [([0], 1), ([75, 75, 0], 3), ([75, 1], 2)])
def test_a_machine_trains_again_after_75_only(machine, statuses, ran):
    machine.answer("python", "*", *((status, "") for status in statuses))
    assert machine.run("gpu_node.sh", "--gpus=8", *TRAINING).status == statuses[-1]
    assert machine.calls() == ["nvidia-smi --list-gpus", *[PROGRAM] * ran]
    assert not (machine.directory / "env").exists()


def test_another_number_of_gpus_ends_it(machine):
    ended = machine.run("gpu_node.sh", "--gpus=4", *TRAINING)
    assert ended.status == 2
    assert "this machine has 8 GPUs but --gpus=4" in ended.err
    assert not machine.calls("python*")


def test_no_gpu_or_no_driver_ends_it(tmp_path):
    for printed, status in (("No devices found", 0), ("", 9)):
        machine = launch_stubs.Stubs(tmp_path / str(status), "python", "nvidia-smi")
        machine.answer("nvidia-smi", "*", (status, printed))
        ended = machine.run("gpu_node.sh", "--gpus=4", *TRAINING)
        assert ended.status == 2
        assert ("has 0 GPUs" if status == 0 else "nvidia-smi failed") in ended.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_saves_and_ends(machine, number):
    machine.answer("python", "*", ("hang", ""))
    process = machine.start("gpu_node.sh", *TRAINING)
    machine.hanging()
    os.kill(process.pid, number)
    assert launch_stubs.ended(process).status == 75
    assert machine.calls() == [PROGRAM]


def test_a_signal_to_the_training_alone_runs_it_again(machine):
    machine.answer("python", "*", ("hang", ""), (0, ""))
    process = machine.start("gpu_node.sh", *TRAINING)
    os.kill(machine.hanging()[0], signal.SIGTERM)
    ended = launch_stubs.ended(process)
    assert ended.status == 0 and "running it again" in ended.err
    assert machine.calls() == [PROGRAM] * 2


# Several machines with GPUs.

NODES = ["--nodes=me@one,two,three", "--port=99"]


def remote(machine, directory):
    """Returns the commands that the hosts got for their shells, in order."""
    calls = sorted(machine.calls(f"ssh *cd {directory}*"))
    return [call.partition(" cd ")[2] for call in calls]


def test_each_host_gets_the_same_command_and_its_number(machine, tmp_path):
    directory = tmp_path / "check out"
    (directory / ".venv" / "bin").mkdir(parents=True)
    (directory / ".venv" / "bin" / "activate").touch()
    ended = machine.run(
        "gpu_node.sh", *NODES, f"--directory={directory}", *TRAINING,
        "--config.data.image_size=(224, 448)",
    )
    assert ended.status == 0, ended.err
    commands = remote(machine, "'*check out'")
    assert len(commands) == 3
    for command in commands:
        subprocess.run(
            ["bash", "-c", f"cd {command}"], env=machine.environment, check=True
        )
    assert machine.calls("python*") == [
        f"{PROGRAM} --config.data.image_size=(224, 448)"
    ] * 3
    numbers = (machine.directory / "env").read_text().splitlines()
    assert sorted(numbers) == [f"one:99 3 {index}" for index in range(3)]
    assert shlex.split(commands[0])[0] == str(directory)


def test_hosts_that_saved_are_started_again_together(machine):
    machine.answer("ssh", "*PROCESS_ID=1*", (75, ""), (0, ""))
    machine.answer("ssh", "*PROCESS_ID=*", (75, ""), (75, ""), (0, ""))
    assert machine.run("gpu_node.sh", *NODES, *TRAINING).status == 0
    assert len(machine.calls("*PROCESS_ID=1*")) == 2


def test_an_error_on_one_host_ends_the_others(machine):
    machine.answer("ssh", "*PROCESS_ID=1*", (1, ""))
    machine.answer("ssh", "*PROCESS_ID=*", ("hang", ""))
    process = machine.start("gpu_node.sh", *NODES, *TRAINING)
    hanging = machine.hanging(2)
    machine.wait_for("ssh * kill*", count=3)
    for number in hanging:
        os.kill(number, signal.SIGTERM)
    ended = launch_stubs.ended(process)
    assert ended.status == 1 and "a host ended with status 1" in ended.err
    assert len(machine.calls("*PROCESS_ID=0*")) == 1


def test_a_signal_to_the_script_is_passed_to_all_hosts(machine):
    machine.answer("ssh", "*PROCESS_ID=*", ("hang", ""))
    process = machine.start("gpu_node.sh", *NODES, *TRAINING)
    hanging = machine.hanging(3)
    os.kill(process.pid, signal.SIGTERM)
    machine.wait_for("ssh * kill*", count=3)
    for number in hanging:
        os.kill(number, signal.SIGTERM)
    assert launch_stubs.ended(process).status == 75


def test_the_gpus_of_every_host_are_counted(machine):
    machine.answer("ssh", "*one nvidia-smi*", (0, EIGHT))
    machine.answer("ssh", "*two nvidia-smi*", (0, "GPU 0: NVIDIA H100"))
    ended = machine.run("gpu_node.sh", "--gpus=8", *NODES, *TRAINING)
    assert ended.status == 2 and "two has 1 GPUs but --gpus=8" in ended.err
    assert not machine.calls("*crossmae*")


WRONG_FOR_GPUS = {
    "--gpus=all is not a number": ["--gpus=all", *TRAINING],
    "--port=x is not a port": ["--port=x", *TRAINING],
    "--workdir=runs/x is not an absolute path":
        ["--nodes=a,b", TRAINING[0], "--workdir=runs/x"],
    "--config is missing": [],
    "--gpu=8 is neither": ["--gpu=8", *TRAINING],
}


@pytest.mark.parametrize("message", WRONG_FOR_GPUS)
def test_wrong_options_for_gpus_end_with_what_to_do(machine, message):
    ended = machine.run("gpu_node.sh", *WRONG_FOR_GPUS[message])
    assert ended.status == 2 and ended.err.startswith(f"gpu_node.sh: {message}")
    assert not machine.calls()


# GKE. What is submitted is checked in test_launch.py.

CLUSTER = [
    "--name=mae", "--image=registry/crossmae_jax:1", "--claim=shared",
    "--accelerator=tpu-v6e-slice", "--topology=4x8",
]


@pytest.mark.parametrize("status", [0, 1])
def test_gke_submits_once(tmp_path, status):
    cluster = launch_stubs.Stubs(tmp_path / "stubs", "kubectl")
    cluster.answer("kubectl", "*", (status, ""))
    ended = cluster.run("gke/submit.sh", *CLUSTER, *TRAINING)
    assert ended.status == 2 * status
    assert cluster.calls() == ["kubectl create --filename=-"]
    assert "kubectl delete jobset mae" in ended.err


WRONG_FOR_GKE = {
    "--name is missing": [],
    "--claim is missing": CLUSTER[:2],
    "--topology=4 cannot be right": [*CLUSTER, "--topology=4", *TRAINING],
    "--topology=4x8 has 32 chips, which --chips-per-host=5 does not divide":
        [*CLUSTER, "--chips-per-host=5", *TRAINING],
    "--workdir=/mnt/shared/run is not below --mount=/data":
        [*CLUSTER, "--mount=/data", *TRAINING],
    "--config is missing": CLUSTER,
    "--spot is neither": [*CLUSTER, "--spot", *TRAINING],
}


@pytest.mark.parametrize("message", WRONG_FOR_GKE)
def test_wrong_options_for_gke_end_with_what_to_do(tmp_path, message):
    cluster = launch_stubs.Stubs(tmp_path / "stubs", "kubectl")
    ended = cluster.run("gke/submit.sh", *WRONG_FOR_GKE[message])
    assert ended.status == 2 and ended.err.startswith(f"submit.sh: {message}")
    assert not cluster.calls()
