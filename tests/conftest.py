"""Every test sees eight fake CPU devices, and shapes that must match in rank.

Programs are compiled without optimisation: most tests compile more than they run.
What one test has compiled others of the same session read back, and so do the processes
that they start.
"""

import atexit
import gc
import os
import platform
import shutil
import signal
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Lines of Python beside each operation of a program take time, and nobody reads them.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process of the session
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)

# Behind nohup, or in a script's background, signals are ignored, and what tests start
# would inherit that. Handlers are not inherited: a new program has the default again.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

import jax  # noqa: E402  the flags above must be set first
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Traced programs are many objects that live long: to look through them seldom will do.
gc.freeze()
gc.set_threshold(50_000, 10, 10)

# The TPU's compiler exists for Linux on x86-64 only.
collect_ignore = []
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    collect_ignore += ["test_tpu_compile.py", "test_layout_compile.py"]

# The page about a run is looked at where a browser is installed; .ci/run installs one.
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, _BROWSERS)), None)
if BROWSER is None:
    collect_ignore += ["test_report_browser.py"]


# Files that take minutes come first, or one of the processes ends alone with them.
_LONG = (
    "test_processes.py", "test_layout.py", "test_layout_compile.py",
    "test_tpu_compile.py", "test_train.py", "test_notebooks.py", "test_parity.py",
    "test_classify.py", "test_skipped_steps.py", "test_watchdog.py", "test_evaluate.py",
)


def pytest_collection_modifyitems(items):
    """Orders the tests; within a file they stay as they are."""
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """Where the digits are prepared, once for all tests."""
    return str(tmp_path_factory.mktemp("digits"))
