"""A run whose memory ends says what it needs, and which settings need less.

As a program, `python -m tests.test_out_of_memory DATA WORKDIR`, a run that may take
150 MB more than it has when its first step begins.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from crossmae_jax import train
from crossmae_jax.commands import session
from crossmae_jax.cost import out_of_memory
from crossmae_jax.distributed import hardware
from tests import quick_digits

ROOT = Path(__file__).parent.parent
MORE = 150 * 10**6


def config_of(data_dir):
    config = quick_digits.get_config()
    config.data.data_dir, config.evals = data_dir, {}
    config.data.batch_size, config.model.encoder.size = 1440, "W128-D2-H2/2"
    return config


@session.command()
def main(argv):
    data_dir, workdir = argv

    def then_no_more(*arguments, **options):
        check(*arguments, **options)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MORE
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def then_all(config, alive):
        # An accelerator that is full leaves the compiler what the host has.
        resource.setrlimit(resource.RLIMIT_AS, 2 * (resource.RLIM_INFINITY,))
        return advice(config, alive)

    check, train.check_kernels = train.check_kernels, then_no_more
    advice, out_of_memory.advice = out_of_memory.advice, then_all
    hardware.host_memory = lambda: MORE
    with session.joined():
        train.run(config_of(data_dir), workdir)


def test_settings_that_need_less_are_compiled_and_named(digits_dir, tmp_path):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.test_out_of_memory", digits_dir, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, text=True,
        capture_output=True,
    )
    assert ended.returncode == 1, ended.stderr
    assert "\nOut of memory: RESOURCE_EXHAUSTED" in ended.stdout
    error = ended.stderr[ended.stderr.index("error: "):].splitlines()
    assert re.match(r"error: Out of memory: RESOURCE_EXHAUSTED: .* \d+ bytes", error[0])
    assert re.match(r"Does the step fit\? no: [\d.]+ .B of 0.15 GB, this", error[1])
    assert error[2] == "It may fit with one of"
    accum, remat, batch = error[3:]
    assert re.match(r" +--config.optim.accum_steps=\d+ +compiled, fits: yes", accum)
    assert re.match(r" +--config.model.remat=full +compiled, fits: (yes|no)", remat)
    assert re.match(r" +--config.data.batch_size=\d+ +untested", batch)


@pytest.fixture
def config(digits_dir):
    return config_of(digits_dir)


def test_a_host_without_memory_says_what_takes_it(config):
    with (
        pytest.raises(out_of_memory.OutOfMemory, match=r"data.workers") as error,
        out_of_memory.advising(config),
    ):
        raise MemoryError("Unable to allocate 8.00 GiB")
    assert "on this host: Unable to allocate 8.00 GiB. It has " in str(error.value)


def test_where_the_step_fits_something_else_takes_the_memory(config):
    small, signs = config.copy_and_resolve_references(), []
    small.data.batch_size = 8
    advising = out_of_memory.advising(config, alive=lambda: signs.append(1))
    with (
        pytest.raises(out_of_memory.OutOfMemory, match=r"fit\? yes: .*") as error,
        advising as about,
    ):
        about.config = small
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
    assert "an evaluation, or another process" in str(error.value) and signs
    assert "more" not in str(error.value).splitlines()[0]


def test_of_several_processes_none_compiles_alone(config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (
        pytest.raises(out_of_memory.OutOfMemory, match="crossmae_jax estimate"),
        out_of_memory.advising(config),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def test_other_errors_stay_what_they_are(config):
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        out_of_memory.advising(config),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
