"""The Cloud TPU launcher, against a gcloud that answers as told."""

import os
import shutil
import signal
import time

import pytest

from tests import launch_stubs
from tests.launch_stubs import LAUNCH, TRAINING

OPTIONS = [
    "--name=mae", "--zone=us-east5-b", "--accelerator-type=v6e-32",
    "--runtime-version=v2-alpha-tpuv6e",
]
QUEUE = "compute tpus queued-resources"
CREATED = f"gcloud {QUEUE} create*"
DELETED = f"gcloud {QUEUE} delete mae --zone=us-east5-b --force --quiet"
STARTED = "gcloud *--worker=all*tpu_host.sh start*"
FOLLOWED = "gcloud *--worker=0*tpu_host.sh follow*"


@pytest.fixture
def cloud(tmp_path):
    """A cloud in which everything succeeds: not there, then active."""
    return launch_stubs.Stubs(tmp_path / "stubs", "gcloud", "git")


def states(cloud, *names, node=("READY",)):
    """Sets the states that the request and its TPU are found in, one after another."""
    cloud.answer("gcloud", f"{QUEUE} list*", *((0, name) for name in names))
    cloud.answer("gcloud", "compute tpus tpu-vm list*", *((0, name) for name in node))


def trainings(cloud, *statuses):
    """Sets how the trainings end, one after another."""
    cloud.answer("gcloud", "*follow", *((status, "") for status in statuses))


def launch(cloud, *more):
    return cloud.run("tpu_pod.sh", *OPTIONS, *more, *TRAINING)


def test_creates_waits_installs_trains_and_deletes(cloud):
    states(cloud, "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    ended = launch(cloud, "--spot", "--project=p", "--setup=mount it", "--noconfig.x")
    assert ended.status == 0, ended.err
    steps = [
        call for call in cloud.calls() if " list " not in call and " diff " not in call
    ]
    wanted = [
        ("queued-resources create mae --node-id=mae", "--spot"),
        ("bundle create", "HEAD"),
        ("tpu-vm scp", "--worker=all"),
        ("tpu-vm ssh", "clone --quiet crossmae_jax.bundle crossmae_jax"),
        ("tpu-vm ssh", "tpu_host.sh install"),
        ("tpu-vm ssh", "--command=mount it"),
        ("--worker=all", f"start 1 --noconfig.x {' '.join(TRAINING)}"),
        ("--worker=0", "tpu_host.sh follow"),
        ("queued-resources delete", "--force --quiet"),
    ]
    assert len(steps) == len(wanted), steps
    for step, parts in zip(steps, wanted, strict=True):
        assert all(part in step for part in parts), (step, parts)
        assert "--zone=us-east5-b --project=p" in step or "bundle" in step
    assert "mae is WAITING_FOR_RESOURCES" in ended.err
    assert not list(cloud.directory.glob("*.bundle"))


def test_changes_that_are_not_sent_are_named(cloud):
    states(cloud, "", "ACTIVE")
    cloud.answer("git", "*diff*", (1, ""))
    ended = launch(cloud)
    assert ended.status == 0 and "not committed are not sent" in ended.err


def test_a_commit_that_cannot_be_packed_ends_it(cloud):
    states(cloud, "", "ACTIVE")
    cloud.answer("git", "*bundle*", (128, ""))
    ended = launch(cloud)
    assert ended.status == 2 and "could not pack the commit" in ended.err
    assert len(cloud.calls(DELETED)) == 1


def test_a_failed_creation_ends_it_and_deletes_nothing(cloud):
    states(cloud, "")
    cloud.answer("gcloud", f"{QUEUE} create*", (1, ""))
    ended = launch(cloud)
    assert ended.status == 2
    assert "mae could not be created" in ended.err
    assert not cloud.calls(DELETED) and not cloud.calls(STARTED)


def test_a_creation_that_failed_half_way_is_deleted(cloud):
    states(cloud, "", "ACCEPTED")
    cloud.answer("gcloud", f"{QUEUE} create*", (1, ""))
    assert launch(cloud).status == 2
    assert len(cloud.calls(DELETED)) == 1


def test_another_tpu_of_that_name_is_left_alone(cloud):
    states(cloud, "ACTIVE")
    ended = launch(cloud)
    assert ended.status == 2
    assert "mae is in us-east5-b already, in state ACTIVE" in ended.err
    assert not cloud.calls(CREATED) and not cloud.calls(DELETED)


def test_a_request_that_fails_is_described_and_deleted(cloud):
    states(cloud, "", "WAITING_FOR_RESOURCES", "FAILED")
    cloud.answer("gcloud", f"{QUEUE} describe*", (0, "no such quota"))
    ended = launch(cloud)
    assert ended.status == 2
    assert "no such quota" in ended.err and "the request for mae FAILED" in ended.err
    assert len(cloud.calls(DELETED)) == 1 and not cloud.calls(STARTED)


@pytest.mark.parametrize("state, node", [
    ("SUSPENDING", "PREEMPTED"), ("SUSPENDED", ""), ("", ""), ("ACTIVE", "PREEMPTED"),
])
@pytest.mark.parametrize("status", [255, 1, 75])
def test_a_spot_tpu_that_was_lost_is_created_again(cloud, state, node, status):
    states(cloud, "", "ACTIVE", state, "", "ACTIVE", node=(node, "READY"))
    trainings(cloud, status, 0)
    ended = launch(cloud, "--spot")
    assert ended.status == 0, ended.err
    assert "mae was lost" in ended.err
    assert len(cloud.calls(CREATED)) == len(cloud.calls(DELETED)) == 2
    assert len(cloud.calls("*install*")) == len(cloud.calls(FOLLOWED)) == 2
    first, second = (call.partition(" start ")[2] for call in cloud.calls(STARTED))
    assert first == f"1 {' '.join(TRAINING)}" and second == f"2 {' '.join(TRAINING)}"


def test_one_that_is_gone_need_not_be_deleted(cloud):
    states(cloud, "", "ACTIVE", "", "", "", "ACTIVE")
    trainings(cloud, 255, 0)
    cloud.answer("gcloud", f"{QUEUE} delete*", (1, "not found"), (0, ""))
    ended = launch(cloud, "--spot")
    assert ended.status == 0, ended.err
    assert "could not be deleted" not in ended.err
    assert len(cloud.calls(CREATED)) == 2


def test_one_that_is_suspended_before_it_was_ready_is_created_again(cloud):
    states(cloud, "", "PROVISIONING", "SUSPENDED", "", "ACTIVE")
    assert launch(cloud, "--spot").status == 0
    assert len(cloud.calls(CREATED)) == 2 and len(cloud.calls(STARTED)) == 1


def test_one_that_is_lost_while_installing_is_created_again(cloud):
    states(cloud, "", "ACTIVE", "SUSPENDED", "", "ACTIVE")
    cloud.answer("gcloud", "*install", (1, ""), (0, ""))
    assert launch(cloud, "--spot").status == 0
    assert len(cloud.calls(CREATED)) == 2 and len(cloud.calls(STARTED)) == 1


def test_status_75_runs_the_same_command_again_on_the_same_tpu(cloud):
    states(cloud, "", "ACTIVE")
    trainings(cloud, 75, 75, 0)
    ended = launch(cloud)
    assert ended.status == 0
    numbers = [call.split(" start ")[1].split()[0] for call in cloud.calls(STARTED)]
    assert numbers == ["1", "2", "3"]
    assert len(cloud.calls(CREATED)) == len(cloud.calls("*install*")) == 1
    assert "running the same command again" in ended.err


def test_a_connection_that_breaks_is_taken_up_again(cloud):
    states(cloud, "", "ACTIVE")
    trainings(cloud, 255, 255, 0)
    assert launch(cloud).status == 0
    numbers = [call.split(" start ")[1].split()[0] for call in cloud.calls(STARTED)]
    assert numbers == ["1", "1", "1"]


@pytest.mark.parametrize("command, message", [
    ("*follow", "could not be followed"), ("*install", "could not be set up"),
])
def test_hosts_that_are_never_reached_are_given_up(cloud, command, message):
    states(cloud, "", "ACTIVE")
    cloud.answer("gcloud", command, (255, ""))
    ended = launch(cloud)
    assert ended.status == 2 and message in ended.err
    assert len(cloud.calls(f"gcloud {command}")) == 5
    assert len(cloud.calls(DELETED)) == 1


def test_an_error_of_the_training_deletes_and_is_passed_on(cloud):
    states(cloud, "", "ACTIVE")
    trainings(cloud, 3)
    ended = launch(cloud)
    assert ended.status == 3
    assert "the training ended with status 3" in ended.err
    assert len(cloud.calls(FOLLOWED)) == len(cloud.calls(DELETED)) == 1


@pytest.mark.parametrize("status", [0, 3])
def test_keep_leaves_the_tpu_and_says_how_to_delete_it(cloud, status):
    states(cloud, "", "ACTIVE")
    trainings(cloud, status)
    ended = launch(cloud, "--keep")
    assert ended.status == status
    assert not cloud.calls(DELETED)
    assert ended.err.splitlines()[-1] == DELETED


@pytest.mark.parametrize("status", [0, 3])
def test_a_deletion_that_fails_says_what_to_run_by_hand(cloud, status):
    states(cloud, "", "ACTIVE")
    trainings(cloud, status)
    cloud.answer("gcloud", f"{QUEUE} delete*", (1, ""))
    ended = launch(cloud)
    assert ended.status == (status or 1)
    assert "mae could not be deleted, and costs money" in ended.err
    assert ended.err.splitlines()[-1] == DELETED


@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143),
])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_ctrl_c_deletes(cloud, number, status, send):
    states(cloud, "", "ACTIVE")
    trainings(cloud, "hang")
    process = cloud.start("tpu_pod.sh", *OPTIONS, *TRAINING)
    cloud.hanging()
    send(process.pid, number)
    ended = launch_stubs.ended(process)
    assert ended.status == status
    assert cloud.calls()[-1] == DELETED and len(cloud.calls(DELETED)) == 1


def test_ctrl_c_while_waiting_deletes(cloud):
    states(cloud, "", "WAITING_FOR_RESOURCES")
    process = cloud.start("tpu_pod.sh", *OPTIONS, *TRAINING)
    cloud.wait_for(f"gcloud {QUEUE} list*", count=4)
    os.killpg(process.pid, signal.SIGINT)
    assert launch_stubs.ended(process).status == 130
    assert cloud.calls()[-1] == DELETED


def test_a_list_that_fails_is_asked_again_and_given_up(cloud):
    cloud.answer("gcloud", f"{QUEUE} list*", (1, ""), (0, ""), (0, "ACTIVE"), (1, ""))
    trainings(cloud, 75)
    ended = launch(cloud)
    assert ended.status == 2 and "could not list TPUs in us-east5-b" in ended.err
    assert len(cloud.calls(DELETED)) == 1


WRONG = {
    "--name is missing": [],
    "--name=Mae is not a name": ["--name=Mae"],
    "--zone is missing": OPTIONS[:1],
    "--accelerator-type is missing": OPTIONS[:2],
    "--runtime-version is missing": OPTIONS[:3],
    "--config is missing": OPTIONS,
    "--workdir is missing": [*OPTIONS, TRAINING[0]],
    "--workdir=runs/x is not an absolute path":
        [*OPTIONS, TRAINING[0], "--workdir=runs/x"],
    "--sport is neither an option": [*OPTIONS, "--sport", *TRAINING],
    "x is neither an option": [*OPTIONS, *TRAINING, "x"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_end_with_what_to_do(cloud, message):
    ended = cloud.run("tpu_pod.sh", *WRONG[message])
    assert ended.status == 2 and ended.err.startswith(f"tpu_pod.sh: {message}")
    assert not cloud.calls()


# One host of the TPU.


@pytest.fixture
def host(tmp_path):
    """A host on which the repository lies and python is a stub."""
    stubs = launch_stubs.Stubs(tmp_path / "stubs", "python", "python3")
    shutil.copytree(LAUNCH, tmp_path / "crossmae_jax" / "launch")
    (tmp_path / "crossmae_jax" / ".venv").mkdir()
    (tmp_path / "crossmae_jax" / ".venv" / "bin").symlink_to(stubs.directory / "bin")
    stubs.script = str(tmp_path / "crossmae_jax" / "launch" / "tpu_host.sh")
    return stubs


def test_a_host_installs_with_the_pinned_versions(host):
    assert host.run(host.script, "install").status == 0
    assert host.calls()[-1] == (
        "python -m pip install --quiet -c constraints.txt -e .[tpu,gcs]"
    )


def test_a_host_trains_in_the_background_and_is_followed_to_its_status(host):
    host.answer("python", "*main*", (75, "step 1"), (0, "step 2"))
    for number, status in (("1", 75), ("2", 0)):
        assert host.run(host.script, "start", number, *TRAINING).status == 0
        ended = host.run(host.script, "follow")
        assert ended.status == status and ended.out == f"step {number}\n"
    assert host.calls() == [f"python -m crossmae_jax.main {' '.join(TRAINING)}"] * 2


def test_a_worker_that_outlives_the_training_does_not_hold_it_up(host):
    host.answer("python", "*main*", ("orphan", "step 1"))
    host.run(host.script, "start", "1", *TRAINING)
    started = time.monotonic()
    assert host.run(host.script, "follow").status == 0
    assert time.monotonic() - started < 10


def test_a_training_is_not_started_twice_and_the_next_waits_for_it(host):
    host.answer("python", "*main*", ("hang", "step 1"), (0, "step 2"))
    host.run(host.script, "start", "1", *TRAINING)
    host.wait_for("python *")
    host.run(host.script, "start", "1", *TRAINING)
    assert len(host.calls()) == 1
    host.environment["CROSSMAE_LAUNCH_WAIT"] = "0.1"
    ended = host.run(host.script, "start", "2", *TRAINING)
    assert ended.status == 1 and "the last training did not end" in ended.err
    follower = host.start(host.script, "follow")
    (process,) = host.hanging()
    os.kill(process, signal.SIGTERM)
    assert launch_stubs.ended(follower).status == 75
    assert host.run(host.script, "start", "2", *TRAINING).status == 0
    assert host.run(host.script, "follow").status == 0
