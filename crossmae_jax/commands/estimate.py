"""Compiles the training step for hardware one need not own; says what it needs.

    python -m crossmae_jax estimate --config=FILE [--config.KEY=VALUE ...] --target=h200

Targets: h200; TPUs in the topologies that are sold, v5e:4x4, v5p:2x2x1, v6e:4x4;
this, the devices of this process. The batch of the configuration is cut over the
target's devices. Nothing is run: memory and exchanges are those of the compiled
program, operations are counted, and the step time is a bound.

Compiling ViT-B takes about half a minute. So the step is compiled once, and again only
where that is asked for:

    --batches=1024,2048   also at these batches: the largest that fits is interpolated
    --tests=1             of the settings that are suggested where it does not fit, how
                          many are compiled, each as long; 0 for none
    --optimized           for a TPU the program that training runs, which takes minutes;
                          without it one that is slower, whose memory may be some 15%
                          more or less: near the chip's, `fits` is "unsure" then

Exit status 2 if the command line is wrong, 1 if a configuration contradicts itself or
the target's compiler is missing; 0 otherwise, whether it fits or not.
"""

from collections.abc import Sequence

from crossmae_jax import errors
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag
from crossmae_jax.distributed import hardware

def _target(text: str) -> str:
    hardware.check_target(text)
    return text


def _batches(text: str) -> tuple[int, ...]:
    sizes = flags.numbers(int)(text)
    if min(sizes, default=1) < 1:
        raise ValueError("expected numbers of images, 1 or more.")
    return sizes


def _tests(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError(f"{number} is not a non-negative integer.")
    return number


_FLAGS = {
    "target": Flag(
        _target, "this, h200, or TPUs such as v5e:4x4", required=True
    ),
    "batches": Flag(_batches, "further batches to compile, such as 1024,2048", ()),
    "tests": Flag(_tests, "suggestions to compile; default: 1", 1),
    "optimized": Flag(bool, "compile a TPU's program as training does", default=False),
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Prints what the configuration that `argv` describes needs of a target."""
    given = flags.parse("estimate", argv, _FLAGS, doc=__doc__, config=flags.of_file)
    config, target, batches = given.config, given.target, given.batches
    optimized = given.optimized
    if target != "this":
        hardware.without_devices()
    # Now that JAX may be imported.
    from crossmae_jax.cost import estimate, estimate_text, fitting

    print(f"{given.title}\nfor {target}\n", flush=True)
    with errors.naming(given.file):
        result = estimate.estimate(config, target, optimized=optimized)
        others = [
            estimate.estimate(
                estimate.with_settings(config, {"data.batch_size": size}), target,
                optimized=optimized,
            )
            for size in batches if size != result.batch_size
        ]
        suggestions = None
        if result.fits == "no":
            suggestions = fitting.suggest(config, result, num_tests=given.tests)
    print(estimate_text.report(
        result, bfloat16=config.model.dtype == "bfloat16", tried=list(batches),
        largest=estimate.largest_batch([result, *others]), suggestions=suggestions,
    ))
