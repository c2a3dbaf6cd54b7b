"""Measures where a decoder's masked patches look, over a set of images.

    python -m crossmae_jax attention --checkpoint=RUN --dir=DIR --to=analysis
    python -m crossmae_jax attention --checkpoint=mae_visualize_vit_base.pth \\
        --tfds=imagenet2012 --data_dir=DATA --split=validation --num_images=5000 \\
        --to=analysis --normalize=true --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225

Prints attention per block from masked patches to visible and to masked ones, per key as
in figure 1 of CrossMAE and by mass, and draws it in DIR/attention.png. Of an MAE also
what becomes of its predictions without either: mean squared error and PSNR on masked
patches. Everything that is printed is in DIR/attention.md.

Exit status 2 if the command line is wrong, 1 if weights or images cannot be read.
"""

from collections.abc import Sequence
from pathlib import Path

from crossmae_jax import errors
from crossmae_jax.commands import convert, flags, session
from crossmae_jax.commands.flags import Flag
from crossmae_jax.data import decoding

_HOW = {
    "num_images": Flag(int, "how many images; default: all"),
    "batch_size": Flag(int, "images at once; default: 32", default=32),
    "workers": Flag(int, "processes that decode images; default: 0", default=0),
    "max_pixels": Flag(
        int, "height times width of the largest image; default: "
        f"{decoding.MAX_PIXELS}, PIL's limit", default=decoding.MAX_PIXELS,
    ),
    "seed": Flag(int, "of the masks; default: 0", default=0),
    "mask_ratio": Flag(float, "share of patches to mask; default: that of training"),
}
_FLAGS = {
    "to": Flag(str, "the folder to write to", required=True),
    "dir": Flag(str, "a folder of images"),
    "max_skipped_share": Flag(
        float, "share of its images that may be of a kind that is not read; default: "
        "0.05",
    ),
    "tfds": Flag(str, "instead of it a TFDS data set in ArrayRecord form"),
    "data_dir": Flag(str, "where TFDS sets are"),
    "split": Flag(str, "of the TFDS set; default: validation"),
    **_HOW,
    **convert.MODEL,
}


@session.command()
def main(argv: Sequence[str]) -> None:
    """Measures what `argv` describes; `argv` follows `attention`."""
    given = flags.parse("attention", argv, _FLAGS, doc=__doc__)
    if (given.dir is None) == (given.tfds is None):
        flags.stop("Give images, by one of --dir=FOLDER and --tfds=NAME.")
    if given.dir is not None and (given.data_dir or given.split):
        flags.stop("--data_dir and --split are of --tfds, and not of --dir.")
    if given.tfds is not None and given.max_skipped_share is not None:
        flags.stop("--max_skipped_share is of --dir, and not of --tfds.")

    import crossmae_jax
    from crossmae_jax import visualize
    from crossmae_jax.data import sources
    from crossmae_jax.probing import decoder_analysis

    with errors.setting_up():
        model = crossmae_jax.load(given.checkpoint, **convert.facts(given))
        if given.dir is not None:
            share = given.max_skipped_share
            accepted = {} if share is None else {"max_skipped_share": share}
            source = sources.FolderSource(given.dir, **accepted)
        else:
            source = sources.TfdsSource(
                given.tfds, data_dir=given.data_dir, split=given.split or "validation"
            )
        to = Path(given.to)
        to.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    how = {name: getattr(given, name) for name in _HOW}
    magnitudes = decoder_analysis.attention(model, source, **how)
    parts = [f"Images: {sources.described(source)}.", magnitudes.table()]
    # One self-attention over visible and masked patches, as MAE has it.
    if model.model.decoder.gives_visible and not model.model.aggregators:
        scores = decoder_analysis.ablations(model, source, **how)
        parts.append(decoder_analysis.table(scores))
    count = min(given.num_images or len(source), len(source))
    title = (
        f"{given.checkpoint}: {count} images, {magnitudes.num_masked or 'no'} masked "
        "keys"
    )
    text = "\n\n".join([f"# Attention of {title}", *parts]) + "\n"
    with errors.using_files():
        picture = visualize.attention_magnitudes(
            magnitudes, to / "attention.png", title=title
        )
        (to / "attention.md").write_text(text)
    print(f"{text}\npicture  {picture}")
