"""Prepares data sets: `data prepare imagenet2012`, `digits`, `photographs`.

    python -m crossmae_jax data prepare imagenet2012 --manual_dir=TARS --data_dir=DIR
    python -m crossmae_jax data prepare digits [--data_dir=DIR]
    python -m crossmae_jax data prepare photographs --data_dir=DIR

Exit status 2 if the command line is wrong, 1 if something is missing, with what to do
about it.
"""

import types
from collections.abc import Sequence

from crossmae_jax import errors
from crossmae_jax.commands import flags, session
from crossmae_jax.commands.flags import Flag

_ACTIONS = {"prepare": "write a data set in the form that training reads"}
_SETS = {
    "imagenet2012": "from the two original tar files",
    "digits": "from the copy inside scikit-learn",
    "photographs": "crops of scikit-image's",
}
_FLAGS = {
    "imagenet2012": {
        "manual_dir": Flag(str, "where the two tar files are", required=True),
        "data_dir": Flag(str, "where TFDS sets go", required=True),
    },
    "digits": {"data_dir": Flag(str, "default: ~/.cache/crossmae_jax")},
    "photographs": {"data_dir": Flag(str, "a folder for them", required=True)},
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Runs the command; `argv` holds what follows `data`."""
    flags.action("data", argv, _ACTIONS, doc=__doc__)
    name = flags.action("data prepare", argv[1:], _SETS, doc=__doc__)
    given = flags.parse(f"data prepare {name}", argv[2:], _FLAGS[name], doc=__doc__)
    with errors.using_files(
        "Nothing was prepared; see that the directories exist, that --data_dir can be "
        "written, and that its disk has room."
    ):
        _PREPARE[name](given)


def _digits(given: types.SimpleNamespace) -> None:
    from crossmae_jax.data.sets import digits

    data_dir = digits.prepare(given.data_dir)
    print(f"The digits lie in {data_dir}. Train on them with\n")
    print("    python -m crossmae_jax.main --config=configs/digits_cross.py \\")
    print(f"        --config.data.data_dir={data_dir} --workdir=runs/digits_cross")


def _photographs(given: types.SimpleNamespace) -> None:
    from crossmae_jax.data.sets import photographs

    photographs.prepare(given.data_dir)
    print(f"The photographs lie in {given.data_dir}. Train on them with\n")
    print("    python -m crossmae_jax.main \\")
    print("        --config=configs/photographs_cross.py \\")
    print(f"        --config.data.dir={given.data_dir}/train \\")
    print(f"        --config.data.eval_dir={given.data_dir}/test \\")
    print("        --workdir=runs/photographs_cross")


def _imagenet(given: types.SimpleNamespace) -> None:
    from crossmae_jax.data.sets import imagenet

    imagenet.prepare(given.manual_dir, given.data_dir)
    print("\nTrain on it with\n")
    print("    python -m crossmae_jax.main --config=configs/vitb_cross.py \\")
    print(f"        --config.data.data_dir={given.data_dir} \\")
    print("        --workdir=runs/vitb_cross")


_PREPARE = {
    "imagenet2012": _imagenet, "digits": _digits, "photographs": _photographs
}
