"""Prepares data sets: `data prepare imagenet2012`, `digits`, `photographs`.

    python -m crossmae_jax data prepare imagenet2012 --manual_dir=TARS --data_dir=DIR
    python -m crossmae_jax data prepare digits [--data_dir=DIR]
    python -m crossmae_jax data prepare photographs --data_dir=DIR

Exit status 1 if something is missing, with what to do about it.
"""

import argparse
import sys


def main(argv: list[str]) -> int:
    """Runs the command; `argv` holds what follows `data`."""
    parser = argparse.ArgumentParser(
        prog="python -m crossmae_jax data", description=__doc__.splitlines()[0]
    )
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser("prepare", help="write a data set in ArrayRecord form")
    names = prepare.add_subparsers(dest="name", required=True)
    imagenet = names.add_parser("imagenet2012", help="from the two original tar files")
    imagenet.add_argument(
        "--manual_dir", required=True, help="where the two tar files are"
    )
    imagenet.add_argument("--data_dir", required=True, help="where TFDS sets go")
    digits = names.add_parser("digits", help="from the copy inside scikit-learn")
    digits.add_argument("--data_dir", help="default: ~/.cache/crossmae_jax")
    photographs = names.add_parser("photographs", help="crops of scikit-image's")
    photographs.add_argument("--data_dir", required=True, help="a folder for them")
    arguments = parser.parse_args(argv)
    try:
        return _prepare(arguments)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error}. Nothing was prepared; see that the directories exist, "
            "that --data_dir can be written, and that its disk has room.",
            file=sys.stderr,
        )
        return 1


def _prepare(arguments: argparse.Namespace) -> int:
    if arguments.name == "digits":
        from crossmae_jax.data.sets import digits

        data_dir = digits.prepare(arguments.data_dir)
        print(f"The digits lie in {data_dir}. Train on them with\n")
        print("    python -m crossmae_jax.main --config=configs/digits_cross.py \\")
        print(f"        --config.data.data_dir={data_dir} --workdir=runs/digits_cross")
    elif arguments.name == "photographs":
        from crossmae_jax.data.sets import photographs

        photographs.prepare(arguments.data_dir)
        print(f"The photographs lie in {arguments.data_dir}. Train on them with\n")
        print("    python -m crossmae_jax.main \\")
        print("        --config=configs/photographs_cross.py \\")
        print(f"        --config.data.dir={arguments.data_dir}/train \\")
        print(f"        --config.data.eval_dir={arguments.data_dir}/test \\")
        print("        --workdir=runs/photographs_cross")
    else:
        from crossmae_jax.data.sets import imagenet

        imagenet.prepare(arguments.manual_dir, arguments.data_dir)
        print("\nTrain on it with\n")
        print("    python -m crossmae_jax.main --config=configs/vitb_cross.py \\")
        print(f"        --config.data.data_dir={arguments.data_dir} \\")
        print("        --workdir=runs/vitb_cross")
    return 0
