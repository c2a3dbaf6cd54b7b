"""What a step needs of hardware: this process' devices, and made-up small ones."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from benchmarks import step
from crossmae_jax import __main__ as front_door
from crossmae_jax import errors
from crossmae_jax.cost import collectives, counting, estimate, estimate_text, fitting
from crossmae_jax.distributed import hardware
from tests.test_benchmarks import TINY

ROOT = Path(__file__).parents[1]
CONFIG = "configs/digits_cross.py"
SIZES = [*TINY, "optim.accum_steps=2"]
FLAGS = [f"--config={CONFIG}", "--target=this", *(f"--config.{x}" for x in SIZES)]


def load(batch_size):
    return step.load_config(
        CONFIG, overrides=[*SIZES, f"data.batch_size={batch_size}"]
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Every configuration is really compiled, but one that was before is remembered."""
    really, known = estimate.estimate, {}

    def remember(config, target, *, optimized=False):
        key = config.to_json(), target, optimized
        if key not in known:
            known[key] = really(config, target, optimized=optimized)
        found, memory = known[key], hardware.host_memory() // 8
        room = found.capacity._replace(sure=memory, most=memory)
        return dataclasses.replace(found, capacity=room)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "estimate", remember)
        yield really


@pytest.fixture(scope="module")
def found():
    """What 16 images in two micro-batches need, on the eight devices."""
    return estimate.estimate(load(16), "this")


@pytest.fixture(scope="module")
def larger():
    """The same for 64 images."""
    return estimate.estimate(load(64), "this")


@pytest.fixture
def run(capsys, monkeypatch):
    """Returns a function that runs the command: status, output, errors."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        try:
            status = front_door.main(["estimate", *arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def make(
    total, *, batch_size=64, sure=100, most=None, accum_steps=1, num_devices=2,
    **changes,
):
    """An estimate for two made-up devices: 10 bytes of weights, 20 of moments."""
    memory = total and estimate.Memory(10, 20, 1, total - 31, 0)
    return estimate.Estimate(
        target="h200", device_kind="H200",
        layout="2 data x 1 fsdp",
        device=hardware.Device(tflops=2, memory=1, bandwidth=100, link=4),
        capacity=estimate.Capacity(sure, most or sure, "all", "do something"),
        batch_size=batch_size, accum_steps=accum_steps, num_devices=num_devices,
        seconds=1.0, flops=12e12,
        memory=memory, refusal="" if total else "RESOURCE_EXHAUSTED: too much",
        **changes,
    )


@pytest.mark.parametrize(
    ("flags", "optimized"), [((), False), (("--optimized",), True)]
)
def test_a_program_that_is_not_made_to_run_fast_says_so(
    run, monkeypatch, flags, optimized
):
    asked = []

    def compiled(config, target, *, optimized):
        asked.append(optimized)
        return make(50, optimized=optimized, batch_size=config.data.batch_size)

    monkeypatch.setattr(estimate, "estimate", compiled)
    status, printed, errors = run(*FLAGS, "--batches=32", *flags)
    assert (status, errors) == (0, "")
    assert asked == [optimized, optimized]
    assert ("not run, nor made to run fast: " in printed) != optimized
    assert ("made to run fast accesses less" in printed) != optimized
    options = hardware.compiler_options("v5e:2x2", optimized=optimized)
    assert bool(options) != optimized


def test_weights_moments_and_images_are_those_of_the_config(found):
    counted = counting.count(load(16))
    trained = counted.params - counted.others["constants"]
    assert found.memory.weights == 4 * counted.params
    assert found.memory.moments == 2 * 4 * trained + 3 * 4  # and three counters
    # Bytes of pixels, label and number.
    assert found.memory.images == 16 * (16 * 16 + 4 + 4) // 8
    assert found.memory.temporaries > 0
    assert 0 <= found.memory.other < 0.1 * found.memory.total
    assert found.flops == counted.train_flops * 16 / 8


def test_temporaries_grow_with_the_batch_and_the_state_does_not(found, larger):
    more = larger.memory.images - found.memory.images
    assert larger.memory.temporaries > found.memory.temporaries + more
    assert larger.memory.weights == found.memory.weights
    assert larger.memory.images == 4 * found.memory.images
    assert larger.flops == 4 * found.flops


def test_every_gradient_is_exchanged_in_every_micro_batch(found):
    (kind,) = found.exchanged
    assert kind.kind == "all-reduce" and kind.exact
    counted = counting.count(load(16))
    trained = counted.params - counted.others["constants"]
    assert 2 * 4 * trained <= kind.num_bytes <= 2 * 4 * (trained + 8)  # and losses
    assert found.sent == pytest.approx(2 * 7 / 8 * kind.num_bytes)


def test_this_machine_is_known_to_be_no_accelerator(found):
    assert (found.device, found.device_kind, found.num_devices) == (None, "cpu", 8)
    assert found.attention == "XLA" and found.roofline() == {}
    assert found.capacity.sure == hardware.host_memory() // 8
    assert found.fits == "yes" and found.accessed is None and found.seconds > 0


def test_the_command_prints_it(run, found):
    status, printed, errors = run(*FLAGS, "--config.data.batch_size=16")
    assert (status, errors) == (0, "")
    assert printed.startswith(f"`{CONFIG}` with `model.encoder.size=W16-D1-H2/4`")
    for text in (
        "fits            yes: ", "8 x cpu; not run", "unknown: no figures for 'cpu'",
        f"2 images in 2 parts, {found.flops / 1e12:.4g} TFLOP",
        "largest batch   not sought", "exchanged       2 all-reduce of ",
    ):
        assert text in printed
    memory = found.memory
    for name, size in dict(weights=memory.weights, all=memory.total).items():
        assert re.search(rf"\| {name} +\| +{size / 1e6:.3f} \|", printed)


def test_further_batches_are_compiled_where_asked_for(run):
    status, printed, _ = run(*FLAGS, "--config.data.batch_size=16", "--batches=16,64")
    assert status == 0
    assert "images (extrapolated from compilations at 16 and 64)" in printed


@pytest.fixture
def small(monkeypatch, found, larger):
    """Makes this machine's memory too small for 64 images and large enough for 16."""
    room = 8 * (found.memory.total + larger.memory.total) // 2
    monkeypatch.setattr(hardware, "host_memory", lambda: room)


def test_what_is_suggested_is_compiled_and_said_to_fit_or_not(run, small):
    status, printed, _ = run(*FLAGS, "--config.data.batch_size=64")
    assert status == 0
    assert re.search(r"^fits +no: ", printed, re.MULTILINE)
    accum, remat, fsdp, batch = printed.splitlines()[-4:]
    assert re.search(r"--config.model.remat=full +untested$", remat)
    assert re.search(r"--config.mesh.fsdp=[248] +untested$", fsdp)
    assert re.search(r"--config.optim.accum_steps=4 +compiled, fits: yes: ", accum)
    assert re.search(r"--config.data.batch_size=\d+ +untested .*other training", batch)


def test_a_program_that_does_not_tell_its_memory_ends_in_one_line(
    compiled_once, monkeypatch
):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda _: None)
    with pytest.raises(errors.SetupError, match="JAX_ENABLE_COMPILATION_CACHE=false"):
        compiled_once(load(16), "this")


def test_no_suggestion_is_compiled_where_that_is_not_wanted(small, monkeypatch):
    too_large = estimate.estimate(load(64), "this")
    monkeypatch.setattr(estimate, "estimate", lambda *_: pytest.fail("compiled"))
    suggested = fitting.suggest(load(64), too_large, num_tests=0)
    assert [list(each.settings) for each in suggested] == [
        ["optim.accum_steps"], ["model.remat"], ["mesh.fsdp"], ["data.batch_size"]
    ]
    assert all(each.tried is None for each in suggested)


def test_recomputation_is_suggested_only_where_there_is_more_of_it():
    config = load(64)
    for value in ("none", "selective", "full"):
        config.model.remat = value
        ways = [next(way) for way in fitting.candidates(config, make(200))]
        assert ({"model.remat": "full"} in ways) == (value != "full")


def test_the_mildest_setting_that_should_do_comes_first():
    # 30 of state, 10 a gradient: 160 bytes for 64 images, of which 60 have room.
    accum, _, batch = fitting.candidates(load(64), make(200))
    assert next(accum) == {"optim.accum_steps": 4}  # 3.3 parts or more; 64 / 2 / 4
    assert next(batch) == {"data.batch_size": 16}  # 2.9 times fewer, halved
    # Twelve images on two devices cannot be cut in four.
    accum, _, batch = fitting.candidates(load(64), make(200, batch_size=12))
    assert list(accum) == [{"optim.accum_steps": 6}]
    assert next(batch, None) is None  # neither 3 nor 1 divide over two devices
    # Of what the compiler refused no sizes are known.
    accum, _, fsdp, batch = fitting.candidates(load(64), make(None, accum_steps=2))
    assert next(accum) == {"optim.accum_steps": 4}
    assert list(fsdp) == [{"mesh.fsdp": 2}]
    assert next(batch) == {"data.batch_size": 32}


def test_weights_are_cut_over_so_many_devices_as_make_it_fit():
    # Of 30 of state and 10 of gradients, two devices save 20, four 30, eight 35.
    eight = [make(total, num_devices=8) for total in (120, 130, 135, 136)]
    found = [
        [way for ways in fitting.candidates(load(64), each) for way in ways
         if "mesh.fsdp" in way]
        for each in eight
    ]
    assert [[way["mesh.fsdp"] for way in ways] for ways in found] == [
        [2, 4, 8], [4, 8], [8], []
    ]
    shared = make(135, num_devices=8, fsdp=4)  # 30 of state are a quarter already
    ways = [next(way) for way in fitting.candidates(load(64), shared)]
    assert not any("mesh.fsdp" in way for way in ways)


def test_a_stronger_setting_follows_one_that_does_not_do(monkeypatch):
    def compile_it(config, target, *, optimized):
        assert optimized
        return make(150 if config.optim.accum_steps < 16 else 90)

    monkeypatch.setattr(estimate, "estimate", compile_it)
    suggested = fitting.suggest(load(64), make(200), num_tests=5)
    assert [(each.settings, each.tried and each.tried.fits) for each in suggested] == [
        ({"optim.accum_steps": 4}, "no"), ({"optim.accum_steps": 8}, "no"),
        ({"optim.accum_steps": 16}, "yes"), ({"model.remat": "full"}, "no"),
        ({"data.batch_size": 16}, "no"), ({"data.batch_size": 8}, None),
    ]


def test_nothing_is_suggested_where_the_weights_alone_are_too_large():
    assert fitting.candidates(load(64), make(200, sure=30)) == []


def test_it_fits_within_what_jax_takes_and_barely_within_what_it_can():
    assert make(100).fits == "yes"
    assert make(101).fits == "no"
    assert make(101, most=101).fits == "barely"
    assert make(102, most=101).fits == "no"
    assert make(None).fits == "no"


@pytest.mark.parametrize(("total", "fits"), [
    (80, "yes"), (86, "unsure"), (100, "unsure"), (114, "unsure"), (120, "no"),
    (None, "no"),
])
def test_a_program_that_is_soon_compiled_is_unsure_near_the_capacity(total, fits):
    found = make(total, optimized=False)
    assert found.fits == fits
    verdict = estimate_text.verdict(found)
    asked = total is None or fits == "unsure"
    assert ("add --optimized" in verdict) == asked and verdict.startswith(fits)


def test_of_devices_that_are_there_the_program_is_that_which_training_runs(found):
    assert found.optimized


class Elsewhere:
    """A device that is not there: it cannot say how much memory it has."""

    def __init__(self, platform):
        self.platform, self.memory_stats = platform, dict


def test_a_gpu_has_what_jax_takes_and_a_tpu_what_its_maker_says():
    gpu = estimate.capacity("h200", hardware.find("H200"), Elsewhere("gpu"))
    assert (gpu.sure, gpu.most) == (105_750_000_000, 133_950_000_000)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in gpu.between
    tpu = estimate.capacity("v5e:2x2", hardware.find("TPU v5e"), Elsewhere("tpu"))
    assert (tpu.sure, tpu.most) == (16 * 10**9, 2**34)
    assert estimate.capacity("this", None, Elsewhere("gpu")) is None


def test_the_bound_is_the_larger_of_operations_and_links():
    exchanged = (collectives.Collective("all-reduce", 1, 32 * 10**9, 32e9),)
    known = make(50, accessed=900e9, exchanged=exchanged)
    # 12 TFLOP at 2 a second; 2 (2 - 1) / 2 * 32 GB at 4; 900 GB at 100.
    assert known.roofline() == pytest.approx(
        {"operations": 6.0, "links": 8.0, "memory": 9.0}
    )
    assert make(50).roofline() == pytest.approx({"operations": 6.0})
    printed = estimate_text.report(known, bfloat16=True)
    assert "8e+03 ms or more, 8 images/s or fewer: a bound, not measured" in printed
    assert "memory 9e+03 ms, not in the bound" in printed
    assert "does not compute in bfloat16" not in printed
    printed = estimate_text.report(make(50), bfloat16=False)
    assert "memory not known" in printed and "does not compute in bfloat16" in printed


def test_the_largest_batch_lies_on_the_line_through_two():
    two = [make(50, batch_size=16), make(70, batch_size=32)]  # 5 bytes for 4 images
    assert estimate.largest_batch(two) == (56, (16, 32))
    odd = [make(50, batch_size=15), make(81, batch_size=30)]  # the room is for 39.2
    assert estimate.largest_batch(odd).batch_size == 38  # two devices
    assert estimate.largest_batch([*two, make(None, batch_size=64)]) == (56, (16, 32))
    # The two nearest to the room of 100 count: here 40 bytes for 32 images.
    three = [*two, make(110, batch_size=64)]
    assert estimate.largest_batch(three) == (56, (32, 64))
    small = [make(150, batch_size=4), make(200, batch_size=8)]
    assert estimate.largest_batch(small).batch_size == 0


def test_without_two_batches_that_were_compiled_none_is_the_largest():
    assert estimate.largest_batch([make(50)]) is None
    assert estimate.largest_batch([make(50), make(50)]) is None
    assert estimate.largest_batch([make(50), make(None, batch_size=128)]) is None
    flat = [make(50, batch_size=16), make(50, batch_size=32)]
    assert estimate.largest_batch(flat) is None


def test_a_refusal_is_reported_in_the_compilers_words():
    printed = estimate_text.report(make(None), bfloat16=True, suggestions=[])
    assert "no: the compiler refuses: RESOURCE_EXHAUSTED: too much" in printed
    assert "| weights " not in printed
    assert "No number of micro-batches" in printed
    assert "--config.mesh.fsdp=0" in printed


WRONG = {
    "Unknown target 'h201'. Known: this, h200, h200:8, and TPUs such as v5e:4x4,":
        (2, ["--target=h201"]),
    "Unknown target 'v5e'. Known": (2, ["--target=v5e"]),
    "target='v5e:2x2x1' has 3 sides and 4 chips; a v5e has 2 sides and at most 256":
        (2, ["--target=v5e:2x2x1"]),
    "target='v6e:16x32' has 2 sides and 512 chips": (2, ["--target=v6e:16x32"]),
    "target='v5e:0x4' has no devices.": (2, ["--target=v5e:0x4"]),
    "target='h200:2x8' has 2 sides; GPUs of a node": (2, ["--target=h200:2x8"]),
    "target='0xh200' has no devices.": (2, ["--target=0xh200"]),
    "--target is missing: this, h200, or": (2, []),
    "--batches=16,many: expected whole numbers": (2, ["--batches=16,many"]),
    "Unknown setting --config.data.batch. Did you mean batch_size?":
        (2, ["--config.data.batch=8"]),
    "flag --tests=-1: -1 is not a non-negative integer":
        (2, ["--target=this", "--tests=-1"]),
    f"error: {CONFIG}: batch_size=12 does not divide over 8 devices; nearest: 8, 16.":
        (1, ["--target=this", "--config.data.batch_size=12"]),
    f"error: {CONFIG}: pred_ratio=0.9 predicts":
        (1, ["--target=this", "--config.masking.pred_ratio=0.9"]),
    f"error: {CONFIG}: Unknown objective 'x'":
        (1, ["--target=this", "--config.objective=x"]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_in_two_lines_at_most(run, message):
    expected, arguments = WRONG[message]
    status, _, errors = run(f"--config={CONFIG}", *arguments)
    assert status == expected and message in errors
    assert len(errors.splitlines()) <= 2 and "Traceback" not in errors


@pytest.mark.parametrize("target, cure", [
    ("v5e:4x4", "pip install libtpu"), ("h200", 'pip install "jax[cuda13]"')
])
def test_a_compiler_that_is_not_installed_is_named(run, monkeypatch, target, cure):
    monkeypatch.setattr(hardware, "_installed", lambda module: False)
    status, printed, errors = run(f"--config={CONFIG}", f"--target={target}")
    assert (status, printed) == (1, "")
    assert f"error: target='{target}' needs" in errors and cure in errors
    with pytest.raises(hardware.MissingCompiler):
        hardware.target_devices(target)


def test_help_says_how_to_call_it(run):
    status, printed, _ = run("--help")
    assert status == 0
    for text in ("--config=FILE", "--target=h200", "--batches=", "--tests="):
        assert text in printed
