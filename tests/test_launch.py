"""Launchers: linted, shown in docs/launching.md as they are, manifests valid."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests import launch_stubs
from tests.launch_stubs import LAUNCH, ROOT, TRAINING

SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
PAGE = ROOT / "docs" / "launching.md"
PROGRAMS = (
    "gcloud", "git", "kubectl", "nvidia-smi", "python", "scontrol", "srun", "ssh",
)


def test_scripts_are_clean_for_shellcheck():
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    found = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_errors(path):
    text = path.read_text()
    if path.name == "training_command.sh":  # sourced by those that do
        return
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_no_line_is_longer_than_88():
    paths = [path for path in LAUNCH.rglob("*") if path.is_file()]
    paths += (ROOT / "tests" / "schemas").iterdir()
    long = [
        f"{path.name}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > 88
    ]
    assert not long


def examples():
    """Returns the commands that the page shows, with what it says they print."""
    blocks = re.findall(r"(?:^    .*\n)+", PAGE.read_text(), re.MULTILINE)
    for block in blocks:
        block = "".join(line[4:] for line in block.splitlines(keepends=True))
        found = re.match(r"\$ ((?:.*\\\n)*.*\n)", block)
        if found:
            yield found[1], block[found.end():]


@pytest.mark.parametrize("example", list(examples()), ids=lambda each: each[0][:25])
def test_the_page_shows_what_dry_runs_print(example, tmp_path):
    command, printed = example
    stubs = launch_stubs.Stubs(tmp_path / "stubs", *PROGRAMS)
    ran = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{command}"], cwd=ROOT, env=stubs.environment,
        capture_output=True, text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == printed
    assert not stubs.calls()


def test_the_page_shows_every_launcher():
    shown = " ".join(command for command, _ in examples())
    page = PAGE.read_text()
    not_started_by_hand = {"training_command.sh", "tpu_host.sh"}
    for path in SCRIPTS:
        if path.name not in not_started_by_hand:
            assert path.name in shown
            assert f"{path.relative_to(LAUNCH)}`" in page
    assert "`skypilot.yaml`" in page


@pytest.mark.parametrize("script", [
    "tpu_pod.sh", "gpu_node.sh", "gke/submit.sh", "slurm.sbatch",
])
def test_help_names_every_option(script, tmp_path):
    stubs = launch_stubs.Stubs(tmp_path / "stubs", *PROGRAMS)
    ended = stubs.run(script, "--help")
    assert ended.status == 0 and not ended.err and not stubs.calls()
    text = (LAUNCH / script).read_text()
    options = re.findall(r"^ +(--[a-z-]+)(?:=\?\*)?\)", text, re.MULTILINE)
    assert "--dry-run" in options
    for option in options:
        assert option in ended.out
    assert "--config=FILE" in ended.out and "set -" not in ended.out


# Manifests.


def schema(name):
    """Returns a validator for one of our manifests."""
    loaded = yaml.safe_load((ROOT / "tests" / "schemas" / name).read_text())
    jsonschema.Draft202012Validator.check_schema(loaded)
    return jsonschema.Draft202012Validator(loaded)


@pytest.fixture
def jobset(tmp_path):
    """The JobSet of a dry run, with a flag that YAML and shells could misread."""
    stubs = launch_stubs.Stubs(tmp_path / "stubs", "kubectl")
    ended = stubs.run(
        "gke/submit.sh", "--dry-run", "--name=mae", "--image=registry/crossmae_jax:1",
        "--claim=shared", "--accelerator=tpu-v6e-slice", "--topology=4x8", *TRAINING,
        FLAG,
    )
    assert ended.status == 0, ended.err
    manifest, _, command = ended.out.rstrip("\n").rpartition("\n")
    assert command == "kubectl create --filename=-"
    return yaml.safe_load(manifest)


FLAG = '--config.data.x=("a\\b", 1, \'c: &d\')'


def test_the_jobset_is_valid(jobset):
    schema("jobset.yaml").validate(jobset)


@pytest.mark.parametrize("change", [
    lambda jobset: jobset["spec"].update(failurePolicies={}),
    lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].pop("name"),
    lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
    lambda jobset: _job(jobset).update(parallelism="8"),
    lambda jobset: _pod(jobset).update(terminationGracePeriod=600),
    lambda jobset: _pod(jobset)["containers"][0]["env"][0].update(value=8),
])
def test_a_jobset_with_a_mistake_is_not_valid(jobset, change):
    change(jobset)
    assert not schema("jobset.yaml").is_valid(jobset)


def _job(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def _pod(jobset):
    return _job(jobset)["template"]["spec"]


def test_the_jobset_starts_the_same_command_on_every_host(jobset):
    job, pod = _job(jobset), _pod(jobset)
    (container,) = pod["containers"]
    assert job["completions"] == job["parallelism"] == 8
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["python", "-m", "crossmae_jax.main"]
    assert container["args"] == [*TRAINING, FLAG]
    (first,) = jobset["spec"]["replicatedJobs"]
    assert jobset["spec"]["coordinator"]["replicatedJob"] == first["name"]
    variables = {each["name"]: each for each in container["env"]}
    assert variables["JAX_NUM_PROCESSES"]["value"] == "8"
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == "$(COORDINATOR):8476"
    # A variable is known to those after it.
    assert list(variables)[0] == "COORDINATOR"
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts["shared"] == "/mnt/shared"
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}


def test_status_75_and_lost_nodes_restart_the_jobset_without_limit(jobset):
    job = _job(jobset)
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    saved, disrupted = job["podFailurePolicy"]["rules"]
    assert saved["action"] == disrupted["action"] == "FailJob"
    assert saved["onExitCodes"]["values"] == [75]
    (container,) = _pod(jobset)["containers"]
    assert saved["onExitCodes"]["containerName"] == container["name"]
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    # podFailurePolicy needs the first; with others than the second, pods start alone.
    assert _pod(jobset)["restartPolicy"] == "Never" and job["backoffLimit"] == 0


def skypilot():
    """Returns the SkyPilot task."""
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_the_skypilot_task_is_valid():
    schema("skypilot.yaml").validate(skypilot())
    wrong = skypilot()
    wrong["resources"]["job_recovery"]["recover_on_exit_code"] = 75
    assert not schema("skypilot.yaml").is_valid(wrong)


def test_skypilot_recovers_from_status_75():
    assert skypilot()["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


@pytest.mark.parametrize("nodes, extra, variables", [
    (1, "gpu", None), (2, "tpu", None), (2, "gpu", "10.0.0.1:8476 2 1"),
])
def test_skypilot_starts_the_same_command_on_every_machine(
    nodes, extra, variables, tmp_path
):
    stubs = launch_stubs.Stubs(tmp_path / "stubs", "python")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    task = skypilot()
    flags = "--config.data.image_size='(224, 448)' --noconfig.data.flip"
    subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, check=True,
        env=stubs.environment | task["envs"] | {
            "FLAGS": flags, "EXTRA": extra, "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1",
        },
    )
    assert stubs.calls() == [
        "python -m crossmae_jax.main --config=configs/vitb_cross.py "
        "--workdir=/shared/vitb_cross "
        "--config.data.image_size=(224, 448) --noconfig.data.flip"
    ]
    path = tmp_path / "stubs" / "env"
    assert (path.read_text().strip() if path.exists() else None) == variables


def test_shell_in_manifests_is_clean_for_shellcheck(tmp_path):
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    for name in ("setup", "run"):
        path = tmp_path / f"{name}.sh"
        path.write_text(skypilot()[name])
        found = subprocess.run(
            [shellcheck, "--shell=bash", "--exclude=SC1091,SC2155", path],
            capture_output=True, text=True, env=os.environ,
        )
        assert found.returncode == 0, found.stdout
