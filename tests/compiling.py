"""What the compilers of devices that are not there make of attention and of the step.

The vendors' own compilers run, in a process of their own: libtpu takes signals over,
and both look for hardware. `make test` installs libtpu beside the packages of .venv and
not among them, where JAX would look for a TPU whenever it starts; `make
test-gpu-compile` does the same with NVIDIA's packages.

    python -m tests.compiling TARGET JOB...

prints a line of JSON for each job, which is

    {"case": "decoder 0.25", "dtype": "bfloat16", "images": 2}
    {"candidate": true, "case": ..., ...}   by benchmarks/attention_triton.py
    {"step": "configs/vitb_mae.py", "overrides": ["data.batch_size=8"]}
    {"groups": true}                        what layout says of the target's devices
    {"memory": 65536, "case": ..., ...}     as if a chip had so few bytes for a kernel
    {"target": "v5e:2x4", "step": ..., ...} for this target of the same compiler instead
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",  # no autotuning without a device
    # The programs are looked at and never run: fast ones take three times as long.
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
}
# A shallow model with heads of the real sizes.
NARROW = [
    "model.encoder.size=W128-D1-H2/16", "model.decoder.dim=64", "model.decoder.depth=1",
    "model.decoder.num_heads=2", "data.batch_size=8",
]


def run_beside(
    target: str, arguments: list[str], **environment: str
) -> subprocess.CompletedProcess:
    """Runs `python -m ...` with a target's compiler, and returns what became of it."""
    beside = Path(sys.prefix) / ("gpu" if "h200" in target else "tpu")
    path = [str(ROOT), str(beside), *os.environ.get("PYTHONPATH", "").split(":")]
    libraries = [str(folder) for folder in beside.glob("nvidia/*/lib")]
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={
            **os.environ, **_ENVIRONMENT, "PYTHONPATH": ":".join(filter(None, path)),
            "LD_LIBRARY_PATH": ":".join(
                [*libraries, os.environ.get("LD_LIBRARY_PATH", "")]
            ),
            **environment,
        },
    )


def compile_for(target: str, jobs: list[dict]) -> list[dict]:
    """Returns what became of each job.

    That is `kernels`, how often each one is called; `collectives`, how often; `error`,
    what the compiler refused it with, "" if it did not. Of a step also `exchanged`, the
    bytes of the collectives, and `sent`; `slices`, that of each device in the order of
    the mesh; `temporaries` and `total`, bytes of memory of a device.
    """
    ran = run_beside(target, ["tests.compiling", target, *map(json.dumps, jobs)])
    found = [json.loads(line) for line in ran.stdout.splitlines() if line[:1] == "{"]
    assert len(found) == len(jobs), ran.stderr
    return found


def _kernels(text: str) -> dict[str, int]:
    """Returns how often a program calls each kernel of attention."""
    names = re.findall(
        r'%attention_(forward|backward)[.\d]* = .*custom_call_target="tpu_custom_call"'
        r'|custom_call_target="(__cudnn\$fmha\w+|__gpu\$xla\.gpu\.triton)"', text,
    )
    names = [tpu or gpu for tpu, gpu in names]
    return {name: names.count(name) for name in sorted(set(names))}


def _compile(job, target, mesh):
    from jax.experimental.pallas import tpu as pltpu

    from benchmarks import attention, attention_triton, step
    from crossmae_jax.cost import estimate
    from crossmae_jax.distributed import hardware
    from tests import attention_cases

    params = pltpu.CompilerParams

    if "step" in job:
        config = step.load_config(job["step"], overrides=job["overrides"])
        lowered = estimate.lower_step(config, list(mesh.devices.flat)).step
        return lowered.compile(compiler_options=hardware.compiler_options(target))
    case = next(c for c in attention_cases.CASES if c.name == job["case"])
    with pytest.MonkeyPatch.context() as patch:
        if "memory" in job:
            options = {"vmem_limit_bytes": job["memory"]}
            patch.setattr(pltpu, "CompilerParams", lambda **_: params(**options))
        candidate = {"attend": attention_triton.attention} if "candidate" in job else {}
        return attention.compile_case(
            case, dtype=job["dtype"], mesh=mesh, images=job["images"], **candidate
        )


def main(argv: list[str]) -> None:
    """Compiles the jobs named on the command line for the target before them."""
    from benchmarks import kernels
    from crossmae_jax.cost import collectives
    from crossmae_jax.distributed import hardware, parallel, sharding

    default, *jobs = argv
    for job in map(json.loads, jobs):
        target = job.get("target", default)
        devices = hardware.target_devices(target)
        if "groups" in job:
            print(json.dumps({"groups": sharding._compact(devices)}), flush=True)
            continue
        mesh = parallel.make_mesh(devices)
        found = {"kernels": {}, "collectives": {}, "error": ""}
        try:
            compiled = _compile(job, target, mesh)
            text = compiled.as_text()
        except kernels.REFUSALS as error:
            found["error"] = f"{type(error).__name__}: {error}"
        else:
            found["kernels"] = _kernels(text)
            exchanged = collectives.read(text, mesh.size)
            found["collectives"] = {each.kind: each.count for each in exchanged}
            if "step" in job:
                memory = compiled.memory_analysis()
                found["exchanged"] = {each.kind: each.num_bytes for each in exchanged}
                found["sent"] = {each.kind: each.sent for each in exchanged}
                found["slices"] = [
                    getattr(device, "slice_index", 0) for device in mesh.devices.flat
                ]
                found["temporaries"] = memory.temp_size_in_bytes
                found["total"] = (
                    memory.argument_size_in_bytes + memory.output_size_in_bytes
                    - memory.alias_size_in_bytes + memory.temp_size_in_bytes
                )
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
