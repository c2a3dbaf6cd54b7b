"""Machines as their files show them, and the command that looks at this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import crossmae_jax
from crossmae_jax import train_step
from crossmae_jax.commands import doctor
from crossmae_jax.distributed import environment

DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep  9 10:00:00 UTC 2025\n"
    "GCC version:  gcc version 12.3.0\n"
)
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\n"
)


def make_machine(root, *, driver=None, nodes=(), pci=()):
    """A tree of the files that a machine with this hardware has."""
    if driver:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(driver)
    for node in nodes:
        (root / "dev" / node).parent.mkdir(parents=True, exist_ok=True)
        (root / "dev" / node).touch()
    for number, vendor in enumerate(pci):
        device = root / f"sys/bus/pci/devices/0000:00:{number:02}.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
    return root


def check(root, **changes):
    settings = dict(root=root, backend="cpu", platforms="", installed=())
    return environment.check_accelerator(**settings | changes)


GPU_BOX = dict(driver=DRIVER.format("580.82.07"), nodes=["nvidia0", "nvidiactl"])
MACHINES = {
    "gpu": (
        GPU_BOX, ["NVIDIA GPU found (driver 580.82.07)", 'install "jax[cuda13]"']),
    "open driver": (
        dict(driver=OPEN_DRIVER.format("595.10"), nodes=["nvidia3"]),
        ["(driver 595.10)", 'install "jax[cuda13]"']),
    "old driver": (
        dict(driver=DRIVER.format("570.133.20"), nodes=["nvidia0"]),
        ["driver 570.133.20", 'install "jax[cuda12]" (jax[cuda13] needs driver 580)']),
    "container without gpus": (
        dict(driver=DRIVER.format("580.82.07")), ["no /dev/nvidia0", "--gpus all"]),
    "device node only": (dict(nodes=["nvidia0"]), ['install "jax[cuda13]"']),
    "tpu v4": (dict(nodes=["accel0", "accel1"]), ["TPU found", 'install "jax[tpu]"']),
    "tpu v6e": (
        dict(nodes=["vfio/0"], pci=["0x8086", "0x1ae0"]),
        ["TPU found", 'install "jax[tpu]"']),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_idle_accelerator_is_an_error_with_the_command_that_cures_it(tmp_path, machine):
    files, texts = MACHINES[machine]
    with pytest.raises(environment.AcceleratorError) as caught:
        check(make_machine(tmp_path, **files))
    for text in [*texts, "JAX_PLATFORMS=cpu"]:
        assert text in str(caught.value)


def test_plugin_that_does_not_start_is_told_from_a_missing_one(tmp_path):
    root = make_machine(tmp_path, **GPU_BOX)
    with pytest.raises(environment.AcceleratorError, match="plugin is installed but"):
        check(root, installed=("jax-cuda13-plugin",))


def test_no_error_where_the_cpu_is_right(tmp_path):
    gpu = make_machine(tmp_path / "gpu", **GPU_BOX)
    passthrough = make_machine(tmp_path / "vm", nodes=["vfio/0"], pci=["0x8086"])
    assert check(passthrough) == "JAX uses the CPU: no NVIDIA GPU or TPU found."
    assert check(gpu, backend="gpu") == "JAX uses the gpu."
    assert "JAX_PLATFORMS=cpu asks for it; found: NVIDIA GPU" in check(
        gpu, platforms="cpu"
    )


def test_environment_says_what_produced_the_numbers(tmp_path, monkeypatch):
    environment.write_environment(tmp_path / "run")
    text = (tmp_path / "run" / "environment.json").read_text()
    written = json.loads(text)
    assert written["versions"]["jax"] == jax.__version__
    assert written["versions"]["crossmae-jax"] == crossmae_jax.__version__
    assert None not in written["versions"].values()
    assert written["platform"] == "cpu" and written["jax_platforms"] == "cpu"
    assert len(written["devices"]) == 8
    assert "xla_force_host_platform_device_count=8" in written["xla_flags"]
    assert os.uname().nodename not in text
    assert environment.package_version("no-such-package") is None


def test_git_commit_is_that_of_the_working_tree(tmp_path):
    def git(*arguments):
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path, check=True, capture_output=True, text=True,
        )
        return done.stdout.strip()

    assert environment.git_commit(tmp_path) is None
    git("init")
    assert environment.git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert environment.git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert environment.git_commit(tmp_path) == f"{commit}-dirty"
    (tmp_path / "inside").mkdir()
    assert environment.git_commit(tmp_path / "inside") is None


def test_doctor_trains_a_step_and_finds_this_machine_well():
    done = subprocess.run(
        [sys.executable, "-m", "crossmae_jax", "doctor"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        jax.__version__, "host 0/1, 1 local of 1 devices (cpu)", "GiB free of",
        "because JAX_PLATFORMS=cpu asks for it", "ok: loss ", "All is well.",
    ):
        assert text in done.stdout


def test_doctor_reports_every_problem_and_fails(capsys, monkeypatch):
    def idle(**_):
        raise environment.AcceleratorError("NVIDIA GPU found, but it is idle.")

    def broken(*_, **__):
        raise RuntimeError("cuDNN is missing")

    monkeypatch.setattr(environment, "check_accelerator", idle)
    monkeypatch.setattr(environment, "PACKAGES", ("jax", "no-such-package"))
    monkeypatch.setattr(train_step, "init_state", broken)
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "PROBLEM: NVIDIA GPU found, but it is idle." in printed
    assert "PROBLEM: no-such-package is not installed" in printed
    assert "PROBLEM: The training step failed: RuntimeError: cuDNN is mi" in printed
    assert "All is well" not in printed


def test_memory_shows_the_limit_of_a_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal:  16777216 kB\nMemAvailable:  3145728 kB\n"
    )
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    limit.write_text("max\n")
    assert doctor._memory(tmp_path).startswith("3.0 GiB available of ")
    assert "container" not in doctor._memory(tmp_path)
    limit.write_text(f"{2 * 2**30}\n")
    assert doctor._memory(tmp_path).endswith("; this container may use 2.0 GiB")
