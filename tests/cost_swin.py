"""Closed formulas for what a Swin costs, to compare the counted cost with.

Multiply-adds of a block on n cells of width d, with an MLP of ratio r, in g groups of s
places each, of which s^2 = w^2 where whole windows are there:

    (4 + 2r) n d^2 + 2 g s^2 d
"""

from ml_collections import ConfigDict

from crossmae_jax import masking
from crossmae_jax.cost import counting
from crossmae_jax.models import swin, windows


def _linear(fan_in: int, fan_out: int) -> int:
    return fan_in * fan_out + fan_out


def encoder_of(config: ConfigDict) -> swin.Swin:
    """Returns the encoder, of which only its sizes are looked at."""
    options = config.model.encoder
    return swin.Swin(
        options.size, tuple(config.data.image_size), options.window,
        config.data.channels, options.mlp_ratio,
    )


def encoder(config: ConfigDict, num_units: int) -> counting.Part:
    """Returns what the encoder costs with so many of its units; parameters w/o tokens.
    """
    made = encoder_of(config)
    ratio, everything = made.mlp_ratio, made.grid[0] * made.grid[1]
    first = made.stages[0]
    patch = (made.patch_size // first.cells) ** 2 * config.data.channels
    # As the references count it: of hidden patches, too.
    macs = everything * first.cells**2 * patch * first.dim
    params = _linear(patch, first.dim) + 2 * first.dim + 2 * made.dim
    for stage, following in zip(made.stages, (*made.stages[1:], None)):
        dim, cells = stage.dim, num_units * stage.cells**2
        hidden = int(dim * ratio)
        num_groups, size = everything * stage.cells**2 // stage.side**2, stage.side**2
        if num_units < everything:
            num_groups, size = windows.groups(cells, stage.side)
        block = 4 * cells * dim**2 + 2 * cells * dim * hidden
        block += 2 * num_groups * size**2 * dim
        macs += stage.depth * block
        tensors = _linear(dim, 3 * dim) + _linear(dim, dim) + 4 * dim
        tensors += _linear(dim, hidden) + _linear(hidden, dim)
        tensors += (2 * stage.side - 1) ** 2 * stage.num_heads
        params += stage.depth * tensors
        if following is not None:
            macs += cells // 4 * 4 * dim * following.dim
            params += 4 * dim * following.dim + 2 * 4 * dim
    return counting.Part(macs, params)


def _counts(config: ConfigDict, num: int) -> masking.TokenCounts:
    masks = config.masking
    return masking.token_counts(
        num, mask_ratio=masks.mask_ratio, pred_ratio=masks.pred_ratio,
        throw_ratio=masks.throw_ratio,
    )


def _aggregator(config: ConfigDict, num: int, num_thrown: int, dim: int, width: int):
    """Returns what PR-MIM's convolution costs, and the last layer on what it adds."""
    options = config.model.aggregator
    aggregates = options.kind != "none"
    taps = options.kernel_size**2 * aggregates
    return counting.Part(
        taps * num * dim + aggregates * num_thrown * dim * width,
        (taps * dim + dim) * aggregates,
    )


def pretraining(config: ConfigDict) -> counting.Cost:
    """Returns what SimMIM or GreenMIM with Swin costs."""
    return (simmim if config.model.encoder.mask_tokens else green)(config)


def simmim(config: ConfigDict) -> counting.Cost:
    """Returns what SimMIM with Swin costs: all in the encoder, a layer behind it."""
    made = encoder_of(config)
    num = made.grid[0] * made.grid[1]
    num_keep, num_pred, num_thrown = _counts(config, num)
    patch_dim = made.patch_size**2 * config.data.channels
    part = encoder(config, num_keep + num_pred)
    mask_token = made.stages[0].dim
    aggregator = _aggregator(config, num, num_thrown, made.dim, patch_dim)
    decoder = (num_keep + num_pred) * made.dim * patch_dim
    macs = part.macs + decoder + aggregator.macs
    unseen = num_thrown * patch_dim * made.stages[0].dim
    return counting.Cost(
        num_patches=num, num_keep=num_keep, num_pred=num_pred, num_thrown=num_thrown,
        decoder_tokens=0,
        parts={
            "encoder": part._replace(params=part.params + mask_token),
            "decoder": counting.Part(decoder, _linear(made.dim, patch_dim)),
            "aggregator": aggregator,
        },
        others={}, refresh=None, differentiated=macs,
        computed=macs - unseen - num_keep * made.dim * patch_dim,
    )


def green(config: ConfigDict) -> counting.Cost:
    """Returns what GreenMIM costs: visible units, and a decoder without class token."""
    made, options = encoder_of(config), config.model.decoder
    num = made.grid[0] * made.grid[1]
    num_keep, num_pred, num_thrown = _counts(config, num)
    patch_dim, wide = made.patch_size**2 * config.data.channels, options.dim
    part, hidden = encoder(config, num_keep), int(wide * options.mlp_ratio)
    tokens = num_keep + num_pred
    blocks = 4 * tokens * wide**2 + 2 * tokens**2 * wide + 2 * tokens * wide * hidden
    params = 2 * 2 * wide + _linear(wide, 3 * wide) + _linear(wide, wide)
    params += _linear(wide, hidden) + _linear(hidden, wide)
    aggregator = _aggregator(config, num, num_thrown, wide, patch_dim)
    decoder = num_keep * made.dim * wide + options.depth * blocks
    decoder += tokens * wide * patch_dim
    macs = part.macs + decoder + aggregator.macs
    unseen = (num - num_keep) * patch_dim * made.stages[0].dim
    return counting.Cost(
        num_patches=num, num_keep=num_keep, num_pred=num_pred, num_thrown=num_thrown,
        decoder_tokens=tokens,
        parts={
            "encoder": part,
            "decoder": counting.Part(
                decoder, _linear(made.dim, wide) + options.depth * params + 3 * wide
                + _linear(wide, patch_dim)  # mask token and norm before it
            ),
            "aggregator": aggregator,
        },
        others={"constants": (num + 1) * wide}, refresh=None, differentiated=macs,
        computed=macs - unseen - num_keep * wide * patch_dim,
    )
