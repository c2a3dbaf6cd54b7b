"""The step benchmark measures the real training step and says what it ran on."""

import argparse
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention_times, gpu, kernels, peer, profiling, step, turns
from crossmae_jax.cost import counting
from crossmae_jax.ops import attention
from tests import attention_cases, fake_reference

TINY = [
    "model.encoder.size=W16-D1-H2/4", "model.decoder.dim=16", "model.decoder.depth=1",
    "model.decoder.num_heads=2", "model.dtype=bfloat16",
]


@pytest.mark.parametrize("kind, peak", [
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("cpu", None),
])
def test_the_peak_is_found_by_the_name_that_jax_gives_a_device(kind, peak):
    assert step.peak_tflops(kind) == peak


def test_overrides_are_numbers_tuples_or_plain_words_and_the_last_one_counts():
    config = step.load_config("configs/digits_cross.py", overrides=[
        "model.dtype=bfloat16", "optim.clip_norm=3", "data.image_size=(8, 16)",
        "seed=1", "seed=2",
    ])
    assert config.model.dtype == "bfloat16" and config.optim.clip_norm == 3.0
    assert config.data.image_size == (8, 16) and config.seed == 2


WRONG_OVERRIDES = {
    "model.dtyp=float32":
        "Unknown setting model.dtyp. Did you mean dtype?",
    "modle.dtype=float32":
        "Unknown setting modle.dtype. Did you mean model?",
    "evals.umap.k=1":
        "Unknown setting evals.umap.k. "
        "There are: knn, linear, rank, reconstruction.",
    "seed.x=1": "Unknown setting seed.x.",
    "masking=0.5": "masking is a group of settings. There are: mask_ratio, noise, "
        "pred_ratio, retain, rounding, throw_by, throw_ratio, together, unit.",
    "optim.base_lr=fast": "optim.base_lr='fast' is of type str; give one of type "
        "float, such as 0.012.",
    "optim.clip_norm=big":
        "optim.clip_norm='big' is of type str; give one of type float.",
    "model.dtype": "'model.dtype' has no value; write model.dtype=VALUE.",
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_a_wrong_override_ends_in_one_line_with_what_to_do(override, capsys):
    with pytest.raises(SystemExit) as caught:
        step.main([
            "--config=configs/digits_cross.py", "--batch=8", f"--override={override}"
        ])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{WRONG_OVERRIDES[override]}\n"


def test_a_config_file_that_does_not_exist_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        step.main(["--config=configs/digits_crss.py", "--batch=8"])
    assert caught.value.code == 2
    assert "Did you mean configs/digits_cross.py?" in capsys.readouterr().err


def test_the_share_of_peak_is_of_all_devices_and_of_bf16_only():
    config = step.load_config(
        "configs/digits_cross.py", overrides=["data.batch_size=8", *TINY]
    )
    run = step.Run("x", config, 1.0, 1, lambda: None, seconds=[0.5, 1.0, 9.0])
    operations = counting.count(config).train_flops * 8
    peak = operations / 1e12 / jax.device_count() * 4  # TFLOP/s: a quarter is used
    assert step.share_of_peak(run, peak) == "25.0%"
    assert step.share_of_peak(run, None) == "unknown"
    config.model.dtype = "float32"
    assert step.share_of_peak(run, peak) == "unknown"


def test_of_a_program_that_does_not_tell_its_memory_it_is_unknown():
    silent = SimpleNamespace(memory_analysis=lambda: None)
    config = step.load_config(
        "configs/digits_cross.py", overrides=["data.batch_size=8"]
    )
    run = step.Run("x", config, 1.0, step.memory_bytes(silent), lambda: None, [1.0])
    assert step.table([run], None).endswith("| 1.0 | unknown |")


def test_configurations_take_turns_and_are_compared_pair_by_pair(monkeypatch, capsys):
    order = []
    measured = step.measure

    def measure(runs, *, num_steps):
        for run in runs:
            def one_step(inner=run.step, name=run.name):
                order.append(name)
                inner()
            run.step = one_step
        measured(runs, num_steps=num_steps)
        for run in runs:  # known times: the ratio of the pairs is 0.5, 0.5, 0.1
            times = {"digits_mae": [2.0, 4.0, 30.0], "digits_cross": [1.0, 2.0, 3.0]}
            run.seconds = times[run.name]

    monkeypatch.setattr(step, "measure", measure)
    arguments = ["--config=configs/digits_cross.py", "--against=configs/digits_mae.py"]
    for override in TINY:
        arguments.append(f"--override={override}")
    step.main([*arguments, "--batch=8", "--steps=3"])
    assert order == ["digits_mae", "digits_cross"] * 3
    printed = capsys.readouterr().out
    assert f"8 x cpu ({step._processor()}); python" in printed
    assert "changed settings: model.encoder.size=W16-D1-H2/4" in printed
    cells = [cell.strip() for cell in printed.splitlines()[-2].split("|")[1:-1]]
    assert cells[:3] == ["digits_cross", "4.0", "2000.0 (1000.0..3000.0)"]
    assert cells[4] == "unknown" and float(cells[5]) > 0
    assert cells[7] == "0.500"


def test_the_table_is_appended_to_the_results(monkeypatch, tmp_path, capsys):
    config = step.load_config(
        "configs/digits_cross.py", overrides=["data.batch_size=8"]
    )
    monkeypatch.setattr(step, "RESULTS", tmp_path / "results" / "step.md")
    monkeypatch.setattr(
        step, "prepare",
        lambda name, config: step.Run(name, config, 1.0, 2**30, lambda: None),
    )
    for _ in range(2):
        step.main(["--config=configs/digits_cross.py", "--batch=8", "--write"])
    printed = capsys.readouterr().out
    assert (tmp_path / "results" / "step.md").read_text() == printed
    flops = counting.count(config).train_flops / 1e9
    assert len(re.findall(rf"\| digits_cross \| .* \| {flops:.2f} \| ", printed)) == 2


def test_a_profile_says_what_the_modules_of_the_model_cost(capsys, tmp_path):
    step.main([
        # Enough images that the modules cost more than the update of the weights.
        "--config=configs/digits_cross.py", "--batch=256", "--steps=1",
        f"--profile={tmp_path}", *[f"--override={override}" for override in TINY],
    ])
    (path,) = tmp_path.glob("digits_cross/**/*.xplane.pb")
    printed = capsys.readouterr().out
    assert f"digits_cross: 3 steps, trace in {path.parent}" in printed
    table = printed.split("| kernel | from | ms a step | share | runs a step |")[1]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.strip().splitlines()[1:]
    ]
    assert len(rows) == 31 and rows[-1][0].endswith(" others")
    times = [float(row[2]) for row in rows[:-1]]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert sum(float(row[3].rstrip("%")) for row in rows) == pytest.approx(100, abs=1)
    assert "blocks_" not in table.replace("blocks_*", "")
    assert "gradient: encoder/" in table or "gradient: decoder/" in table


PROGRAM = """
ENTRY %main {
  %loop_add_fusion.4 = f32[2] fusion(x), \
metadata={op_name="jit(f)/encoder/blocks_3/add"}
  loop_add_fusion.5 = f32[2] fusion(x), \
metadata={op_type="add" op_name="jit(f)/encoder/blocks_11/add" stack_frame_id=1}
  ROOT %while.7 = f32[2]{0} while(%y), metadata={op_name="jit(step)/while"}
}
"""


@pytest.mark.parametrize("path, origin", [
    ("jit(step)/jvp(M)/encoder/blocks_3/norm1/add", "encoder/blocks_*/norm1/add"),
    ("jit(step)/transpose(jvp(M))/fusion/add_any", "gradient: fusion/add_any"),
    ("jit(step)/transpose(jvp(M))/encoder/blocks_1/blocks_1._run/jvp(M)/encoder/"
     "blocks_1/blocks_1._run/checkpoint/blocks_1.<lambda>/mlp.contract/fc2/dot_general",
     "gradient: encoder/blocks_*/mlp.contract/fc2/dot_general"),
    ("jit(step)/transpose(jvp(M))/encoder/jvp(M)/encoder/blocks_1/checkpoint/"
     "rematted_computation/blocks_1._project/norm1/mul",
     "again: encoder/blocks_*/norm1/mul"),
    ("jit(step)/integer_pow", "integer_pow"),
])
def test_what_a_kernel_comes_from_is_told_in_short(path, origin):
    program = f'  %fusion.4 = f32[2] fusion(x), metadata={{op_name="{path}"}}'
    assert profiling.origins(program) == {"fusion.4": origin}


def _line(name, *events):
    return SimpleNamespace(name=name, events=[
        SimpleNamespace(name=event, duration_ns=duration, stats=stats)
        for event, duration, stats in events
    ])


def _profile(monkeypatch, **planes):
    data = SimpleNamespace(planes=[
        SimpleNamespace(name=name.replace("_", "/", 1), lines=lines)
        for name, lines in planes.items()
    ])
    monkeypatch.setattr(
        jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda path: data)
    )
    return profiling.kernels("x", PROGRAM, num_steps=2)


HOST = [_line(
    "tf_XLAEigen/1",
    ("loop_add_fusion.4", 4e6, [("hlo_op", "loop_add_fusion.4")]),
    ("end: loop_add_fusion.4", 5e6, [("hlo_op", "loop_add_fusion.4")]),
    ("while.7", 7e6, [("hlo_op", "while.7")]),
    ("ThunkExecutor::Execute", 9e6, []),
    ("copy.1", 1e6, [("hlo_op", "copy.1")]),
)]


def test_on_a_cpu_the_operations_of_the_program_are_added_up(monkeypatch):
    assert _profile(monkeypatch, **{"_host:CPU": HOST}) == [
        profiling.Kernel("loop_add_fusion", "encoder/blocks_*/add", 2e-3, 0.5),
        profiling.Kernel("copy", "", 0.5e-3, 0.5),
    ]


def test_on_a_gpu_the_kernels_of_its_streams_are_added_up(monkeypatch):
    streams = [
        _line(
            "Stream #13(Compute)",
            ("loop_add_fusion_4", 4e6, [("hlo_op", "loop_add_fusion.4")]),
            ("loop_add_fusion_5", 2e6, [("hlo_op", "loop_add_fusion.5")]),
            ("nvjet_hsh_128x256_64x4_TNT", 9e6, []),
        ),
        _line("Stream #14(MemcpyD2D)", ("MemcpyD2D", 1e6, [])),
        _line("XLA Modules", ("jit_step", 99e6, [])),
    ]
    planes = {"_host:CPU": HOST, "_device:GPU:0": streams}
    assert _profile(monkeypatch, **planes) == [
        profiling.Kernel("nvjet_hsh_128x256_64x4_TNT", "", 4.5e-3, 0.5),
        profiling.Kernel("loop_add_fusion", "encoder/blocks_*/add", 3e-3, 1.0),
        profiling.Kernel("MemcpyD2D", "", 0.5e-3, 0.5),
    ]


def test_everything_for_a_gpu_runs_on_tiny_sizes(monkeypatch, tmp_path, capfd):
    two = (gpu.Row("vitb_mae"), gpu.Row("vitb_cross", 1.0, ("data.batch_size=3",)))
    monkeypatch.setattr(gpu, "STEPS", (two,))
    monkeypatch.setattr(gpu, "REMAT", ())
    monkeypatch.setattr(gpu, "LARGE", ())
    monkeypatch.setattr(gpu, "PEER_CONFIGS", ("vitb_mae",))
    monkeypatch.setattr(gpu, "PROFILED", ("vitb_mae",))
    monkeypatch.setattr(gpu, "TRACES", tmp_path / "traces")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results" / "gpu.md")
    compare = peer.compare

    def compared(path, *arguments, theirs, **options):
        if theirs == ["reference, compiled"]:  # as tests/test_turns.py does once
            return ["| vitb_mae, compiled |"]
        return compare(path, *arguments, theirs=theirs, **options)

    monkeypatch.setattr(peer, "compare", compared)
    config = step.load_config("configs/vitb_mae.py", overrides=list(gpu.TINY))
    reference = fake_reference.write(
        tmp_path / "fake", num_params=counting.count(config).params
    )
    gpu.main([
        "--quick", "--write", f"--reference={reference}", "--attention-case=50x50x64"
    ])
    printed = capfd.readouterr().out
    assert (tmp_path / "results" / "gpu.md").read_text() == printed
    assert "There is no GPU" in printed and "torch 2" in printed
    parts = dict(zip(
        *[iter(re.split(r"^#### (\w+)\n", printed, flags=re.MULTILINE)[1:])] * 2,
        strict=True,
    ))
    assert list(parts) == list(gpu.PARTS)
    assert re.search(r"\| copy, .* GB/s \|", parts["ceiling"])
    assert parts["ceiling"].count("TFLOP/s |") == 1 + len(kernels.LAYERS)
    assert re.search(r"\| cudnn \| refused: .*cuDNN was not", parts["attention"])
    assert re.search(r"\| 50x50x64 \| xla \| [1-9]\.\de-03 \| ", parts["attention"])
    assert parts["attention"].count("\n| ") == 2 + 1 + 3  # an empty loop, and ours
    mae, cross = parts["steps"].splitlines()[3:5]
    assert re.fullmatch(r"\| vitb_mae \| 8 \| [\d.]+ \| [\d.]+ \(.*", mae)
    assert "| 3 | ValueError: batch_size=3 does not divide over 8 devices" in cross
    assert re.search(r"\| \d+ others \| \| [\d.]+ \| ", parts["profile"])
    (trace,) = (tmp_path / "traces" / "vitb_mae").rglob("*.xplane.pb")
    assert "fusion" in (trace.parent / "program.txt").read_text()
    assert "| of the measured ceiling |" in parts["remat"]
    assert re.search(r"\| vitb_mae \| reference \| [\d.]+ \|", parts["peer"])
    assert parts["compiled_peer"].splitlines()[3] == "| vitb_mae, compiled |"


def test_without_a_gpu_only_the_quick_run_is_of_use(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--quick runs everything on tiny sizes" in capsys.readouterr().err


def test_a_step_is_compared_with_the_first_of_its_group():
    args = argparse.Namespace(batch=8, quick=True)
    first, second = (object.__new__(turns.Player) for _ in range(2))
    for player, seconds in ((first, [1.0, 2.0]), (second, [0.5, 1.0])):
        player.name, player.fallen, player.seconds = "configs/vitb_mae.py", "", seconds
        player.facts, player.peak_bytes = {"compile_seconds": 3.0}, 2**29
    cells = gpu.cells(
        gpu.Row("vitb_cross"), second, first, args=args, tflops=1e-3
    )
    flops = {
        name: counting.count(
            step.load_config(f"configs/{name}.py", overrides=list(gpu.TINY))
        ).train_flops
        for name in ("vitb_cross", "vitb_mae")
    }
    done = flops["vitb_cross"] * 8 / 0.75 / jax.device_count()
    assert cells == [
        "vitb_cross", "8", f"{8 / 0.75:.1f}", "750.0 (500.0..1000.0)",
        f"{done / 1e12:.3g}", f"{done / 1e9:.1%}", "0.50", "3.0", "0.500",
        f"{flops['vitb_cross'] / flops['vitb_mae']:.3f}",
    ]
    first.fallen = "MemoryError: no room"
    row = gpu.Row("vitb_cross")
    assert gpu.cells(row, second, first, args=args, tflops=None)[8:] == ["", ""]
    assert gpu.cells(row, first, first, args=args, tflops=None)[2] == first.fallen


def test_in_a_loop_on_the_device_each_call_takes_a_number_of_the_one_before():
    def call(x):
        return 0.5 * x + 1, x

    looped = jax.jit(attention_times._looped(call, 3))(jnp.full((1, 1, 1, 2), 4.0))
    first = 0.0  # of results that there are not yet
    for _ in range(3):
        taken = math.tanh(first)
        first = 0.5 * taken + 1 + taken
    expected = [0.5 * taken + 1, 3.0], [taken, 4.0]
    assert [x.tolist() for x in looped] == [
        [[[pytest.approx(x, rel=1e-6)]]] for x in expected
    ]


def test_attention_that_is_wrong_shows_in_its_errors():
    (case,) = (case for case in attention_cases.SMALL if case.name == "50x50x64")

    def wrong(q, k, v, bias):
        return 1.5 * attention.attention(q, k, v, bias=bias, impl="xla")

    rows = list(attention_times.table([case], {"wrong": wrong}, images=2, quick=True))
    cells = rows[-1].split("|")
    found = [float(error) for error in [cells[3], *cells[4].split(",")]]
    assert found == pytest.approx([0.5] * 4, abs=0.02)
