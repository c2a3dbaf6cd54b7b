"""What a run runs on: versions and devices, and whether JAX uses the accelerator.

`environment.json` beside a run's config says what produced its numbers. The check is
for the silent case: a machine with a GPU or TPU whose JAX was installed without the
plugin trains on the CPU, a hundred times slower, without a word. To use the CPU on
purpose, set JAX_PLATFORMS=cpu.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import crossmae_jax
from crossmae_jax import errors, paths

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
    "tensorflow-datasets", "array-record", "numpy",
)
_PLUGINS = {
    "NVIDIA GPU": ("cuda", ("jax-cuda13-plugin", "jax-cuda12-plugin")),
    "TPU": ("tpu", ("libtpu",)),
}
_GOOGLE_PCI_VENDOR = "0x1ae0"
_CUDA13_DRIVER = 580  # CUDA 13 release notes: the oldest driver branch it runs on


class AcceleratorError(errors.UserError, RuntimeError):
    """The machine has an accelerator that JAX does not use."""


def versions() -> dict[str, str | None]:
    """Returns the versions of Python, of our package and of those it is built on."""
    return {
        "python": platform.python_version(),
        "crossmae-jax": crossmae_jax.__version__,
        **{name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str | None:
    """Returns the version of an installed package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(directory: Path) -> str | None:
    """Returns the commit of a working tree, `-dirty` if tracked files are changed.

    None if `directory` is not the top of a working tree, or git is not installed.
    """
    if not (directory / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=directory, capture_output=True, text=True, check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def describe() -> dict[str, Any]:
    """Returns what one needs to repeat a run, and nothing that names the machine."""
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax_platforms": jax.config.jax_platforms or "",
        "git_commit": git_commit(Path(crossmae_jax.__file__).parents[1]),
    }


def command() -> list[str] | None:
    """Returns the command that this process runs, None if it is none of ours."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    is_own = module is not None and module.name.startswith("crossmae_jax.")
    return sys.orig_argv if is_own or Path(sys.argv[0]).name == "crossmae-jax" else None


def write_environment(workdir: str | Path) -> None:
    """Writes `environment.json`, from process 0: `describe` and the command."""
    if jax.process_index() != 0:
        return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    content = describe() | {"command": command()}
    text = json.dumps(content, indent=2) + "\n"
    paths.write_whole(workdir / "environment.json", text)


def num_gpus(root: Path = Path("/")) -> int:
    """Returns how many NVIDIA GPUs a machine's files show; `root` as below."""
    return len(list((root / "dev").glob("nvidia[0-9]*")))


def find_accelerator(root: Path = Path("/")) -> tuple[str, str] | None:
    """Returns the kind of accelerator that a machine's files show, and what showed it.

    Args:
      root: the root of the file system; another one in tests.
    """
    driver = root / "proc/driver/nvidia/version"
    nodes = num_gpus(root)
    if driver.exists() or nodes:
        text = driver.read_text() if driver.exists() else ""
        version = re.search(r"Kernel Module.*? (\d+\.[\d.]+)", text)
        shown = f"driver {version[1]}" if version else "driver"
        if not nodes:
            shown += (
                ", but no /dev/nvidia0: start a container with access to the GPUs, "
                "--gpus all"
            )
        return "NVIDIA GPU", shown
    if any((root / "dev").glob("accel[0-9]*")):
        return "TPU", "/dev/accel*"
    if (root / "dev/vfio").exists():
        for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
            if vendor.read_text().strip() == _GOOGLE_PCI_VENDOR:
                return "TPU", "/dev/vfio and a PCI device of Google"
    return None


def _install_command(kind: str, shown: str) -> str:
    if kind == "TPU":
        return 'pip install "jax[tpu]"'
    driver = re.match(r"driver (\d+)", shown)
    if driver and int(driver[1]) < _CUDA13_DRIVER:
        return f'pip install "jax[cuda12]" (jax[cuda13] needs driver {_CUDA13_DRIVER})'
    return 'pip install "jax[cuda13]"'


def check_accelerator(
    *,
    root: Path = Path("/"),
    backend: str | None = None,
    platforms: str | None = None,
    installed: tuple[str, ...] | None = None,
) -> str:
    """Returns one line on what JAX uses and why.

    Args:
      root, backend, platforms, installed: what to look at instead of this machine's
        files, JAX's platform, JAX_PLATFORMS and the installed JAX plugins.

    Raises:
      AcceleratorError: if there is an accelerator, JAX uses the CPU, and nobody asked
        for that.
    """
    backend = jax.default_backend() if backend is None else backend
    platforms = jax.config.jax_platforms if platforms is None else platforms
    device = find_accelerator(root)
    if backend != "cpu":
        return f"JAX uses the {backend}."
    if platforms:
        asked = f"JAX uses the CPU because JAX_PLATFORMS={platforms} asks for it"
        return f"{asked}; found: {' ('.join(device)})." if device else f"{asked}."
    if device is None:
        return "JAX uses the CPU: no NVIDIA GPU or TPU found."
    kind, shown = device
    name, plugins = _PLUGINS[kind]
    if installed is None:
        installed = tuple(plugin for plugin in plugins if package_version(plugin))
    if installed:
        problem = f"{', '.join(installed)} is installed but did not start"
        cure = f"python -c 'import jax; jax.devices(\"{name}\")' shows why"
    else:
        problem = "JAX was installed without its plugin and would use the CPU"
        cure = f"Install it: {_install_command(kind, shown)}"
    raise AcceleratorError(
        f"{kind} found ({shown}), but {problem}. {cure}. To use the CPU on purpose, "
        "set JAX_PLATFORMS=cpu."
    )
