"""Devices are known by name; compiling for them touches none, nor a user's settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossmae_jax.distributed import hardware

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind, memory", [
    ("NVIDIA H200", 141), ("NVIDIA H200 NVL", 141), ("NVIDIA A100-SXM4-80GB", 80),
    ("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA A100 80GB PCIe", 80), ("TPU v5 lite", 16),
    ("TPU v5", 95), ("TPU v6 lite", 32), ("cpu", None),
    ("NVIDIA GH200 480GB", None),  # another one than the H200
])
def test_a_device_is_known_by_the_name_that_jax_gives_it(kind, memory):
    device = hardware.find(kind)
    assert memory == (device and device.memory)


# The compilers are called here as if they were installed; what is asked is whether the
# environment was set before JAX was imported, and whether what the user set was left.
SETTING = """
import os, sys
from crossmae_jax.distributed import hardware
from crossmae_jax.commands import estimate as command
hardware._installed = lambda module: True
def stop():
    assert "jax" not in sys.modules
    raise SystemExit("as set: " + " ".join(
        os.environ.get(name, "nothing") for name in (
            "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK",
            "ALLOW_MULTIPLE_LIBTPU_LOAD", "XLA_FLAGS",
        )
    ))
class Stopper:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            stop()
sys.meta_path.insert(0, Stopper())
command.main(["--config=configs/digits_cross.py", *sys.argv[1:]])
"""


@pytest.mark.parametrize("target, before, after", [
    ("v5e:2x2", {}, "cpu 1 1 1 nothing"),
    ("h200", {"JAX_PLATFORMS": "tpu", "XLA_FLAGS": "--mine"}, "tpu 1 1 1 --mine"),
    ("this", {}, "nothing" + 4 * " nothing"),
])
def test_hardware_is_not_looked_for_and_a_users_settings_stay(target, before, after):
    names = (
        "JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK",
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "XLA_FLAGS",
    )
    rest = {name: value for name, value in os.environ.items() if name not in names}
    found = subprocess.run(
        [sys.executable, "-c", SETTING, f"--target={target}"], cwd=ROOT,
        env={**rest, **before, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )
    assert found.stderr.splitlines()[-1] == f"as set: {after}"
