"""What was compiled is kept for the next launch; compiling twice in one is said."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from crossmae_jax.distributed import programs

ROOT = Path(__file__).parent.parent
# A command as all are; its program is compiled in less time than is worth keeping.
COMMAND = """
from crossmae_jax.commands import session
from crossmae_jax.distributed import programs
with session.joined():
    import jax
    record = programs.Record()
    with record.listening():
        jax.jit(lambda x: x * 2)(jax.numpy.ones(3))
    print(record.told())
"""


def launch(cache, **changes):
    kept = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=ROOT, capture_output=True, text=True,
        env=kept | {"XDG_CACHE_HOME": str(cache)} | changes,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-1]


def test_what_a_launch_compiles_the_next_one_reads(tmp_path):
    place = tmp_path / "crossmae_jax" / "programs"
    said = launch(tmp_path)
    assert said.endswith("s to compile, too short to be kept")
    all_of_them = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    said = launch(tmp_path, **all_of_them)
    assert said.endswith(f"s to compile, kept in {place}") and list(place.iterdir())
    said = launch(tmp_path, **all_of_them)
    assert said.endswith(f" s to read what is compiled from {place}")
    assert " to compile" not in said


@pytest.fixture
def settings():
    """JAX as it is where the environment says nothing of a cache."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_up_to_a_size(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    programs.keep()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "crossmae_jax/programs")
    assert settings.jax_compilation_cache_max_size == 5_000_000_000
    settings.update("jax_compilation_cache_dir", None)
    settings.update("jax_compilation_cache_max_size", -1)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")  # no limit
    programs.keep()
    assert settings.jax_compilation_cache_max_size == -1


def test_a_program_that_was_cut_short_is_removed(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    place = programs.directory()
    place.mkdir(parents=True)
    for name in ("jit_step-1-cache", "jit_step-1-atime", "jit_step-2-cache"):
        (place / name).write_bytes(b"12345678")
    programs.keep()
    assert {path.name for path in place.glob("jit*")} == {
        "jit_step-1-cache", "jit_step-1-atime"
    }


def test_the_environment_comes_first(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    programs.keep()
    assert settings.jax_compilation_cache_dir is None
    settings.update("jax_compilation_cache_dir", "gs://bucket/programs")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    programs.keep()
    assert settings.jax_compilation_cache_dir == "gs://bucket/programs"
    assert settings.jax_compilation_cache_max_size == -1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_compiled(settings, tmp_path, monkeypatch):
    (tmp_path / "crossmae_jax").write_text("a file in its place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    programs.keep()
    record = programs.Record()
    record.programs.append(programs.Program("step", 70.0, from_disk=False))
    assert record.told() == "70.0 s to compile, not kept"


def test_a_function_that_is_compiled_again_says_which_argument_changed():
    said, record = [], programs.Record()
    with record.listening():
        step = programs.Once(
            jax.jit(lambda state, batch: state["w"] + batch["x"].sum()),
            ("state", "batch"), record, said.append,
        )
        state, batch = {"w": jnp.float32(1)}, {"x": jnp.ones(4)}
        jax.jit(lambda x: x + 3)(batch["x"])  # somebody else's
        assert step.told() == ""
        before = len(record.programs)
        result = step(state, batch)
        assert len(record.programs) == before + 1
        assert step.told() == record.told(before) != ""
        for _ in range(2):
            step(state, batch)
        assert result == 5 and not said
        step(state, {"x": jnp.ones(3)})
        assert "WARNING: compiled again" in said[0]
        assert said[0].endswith(": batch['x'] was float32[4], is float32[3]")
        step(state, {"x": jnp.ones(3)})
        assert len(said) == 1
        moved = jax.device_put(jnp.ones(4), jax.devices()[1])
        step({"w": jax.device_put(state["w"], jax.devices()[1])}, {"x": moved})
    assert "state['w'] lies was" in said[1] and "batch['x'] lies was" in said[1]
    step(state, {"x": jnp.ones(5)})
    assert len(said) == 2, "nobody listens any more"


def test_hosts_are_told_how_to_share_what_they_compile(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    programs.keep()
    assert settings.jax_compilation_cache_dir is None
    record = programs.Record()
    record.programs.append(programs.Program("step", 70.0, from_disk=False))
    assert "not kept (JAX_COMPILATION_CACHE_DIR=DIR, a" in record.told()
