"""Measures the memory and time of importing weights: MAE's whole model as a .pth file.

    python -m benchmarks.conversion --config=configs/vith_mae.py

Writes a checkpoint of random numbers in the references' layout, then imports it by the
command in processes of their own: without the check and, where timm is installed, with
it. The peak is that of the process's resident memory, pages of mapped files included,
as Linux counts it; beside it stands that of a process that does nothing but import
the same packages.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import step
from crossmae_jax.convert import names, spellings
from crossmae_jax.convert.files import torch_file
from crossmae_jax.convert.files.tensor import Tensor
from crossmae_jax.objectives import OBJECTIVES

# Prints the peak in KiB. Not ru_maxrss: that starts at the peak of the parent process.
_PEAK = """
import re
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
_NOTHING = "import crossmae_jax.convert; from crossmae_jax.commands import convert"
_PACKAGES = (
    f"{_NOTHING}; from crossmae_jax.convert import packages; "
    "packages.obstacle('timm', ('timm',))"
)


def write_checkpoint(config_path: str, path: Path) -> None:
    """Writes random weights of a configuration's model in the references' layout."""
    config = step.load_config(config_path, overrides=[])
    objective = OBJECTIVES[config.objective](config)
    abstract = jax.eval_shape(objective.init, jax.random.key(0))
    random = np.random.default_rng(0)

    def drawn(shape):
        # As small as trained ones: activations stay in range.
        return lambda: random.standard_normal(shape, np.float32) * np.float32(0.02)

    ours = {
        name: Tensor(leaf.shape, np.dtype(np.float32), drawn(leaf.shape))
        for name, leaf in names.without_collections(abstract).items()
    }
    theirs, _ = spellings.to_theirs(
        spellings.MAE, ours, patch_size=objective.model.encoder.patch_size
    )
    torch_file.write(path, {"model": theirs})


def run(code: str) -> tuple[float, int, str]:
    """Runs Python in a process; returns its seconds, peak bytes and output."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{_PEAK}"], capture_output=True, text=True
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stderr)
    *lines, peak = done.stdout.splitlines()
    return seconds, int(peak) * 1024, "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--dir", help="where the files go; default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        path = Path(directory) / "checkpoint.pth"
        write_checkpoint(args.config, path)
        size = path.stat().st_size

        def importing(name, *flags):
            arguments = ["import", str(path), f"--to={Path(directory) / name}", *flags]
            return f"{_NOTHING}; assert convert.main({arguments!r}) == 0"

        print(step.conditions([], f"import of a file of {size / 1e9:.3f} GB"))
        print(step.row(["process", "seconds", "peak, GB", "peak / file"]))
        print(step.row(["---"] * 4))
        output = ""
        for name, code in (
            ("imports packages only", _NOTHING),
            ("import, no check", importing("unchecked", "--no_check")),
            ("imports packages of the check only", _PACKAGES),
            ("import with its check", importing("checked")),
        ):
            seconds, peak, output = run(code)
            print(step.row([
                name, f"{seconds:.1f}", f"{peak / 1e9:.3f}", f"{peak / size:.2f}"
            ]), flush=True)
        print(f"\nThe last one said:\n\n{output}")


if __name__ == "__main__":
    main()
