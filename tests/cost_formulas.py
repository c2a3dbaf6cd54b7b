"""Closed formulas for what a configuration costs, to compare the counted cost with.

Multiply-adds of one image's forward pass, for n tokens of width d and an MLP of ratio
r, as the papers have them:

    self-attention block     (4 + 2r) n d^2 + 2 n^2 d
    cross-attention block    (2 + 2r) q e^2 + 2 k d e + 2 q k e     q queries of width e
    depth-wise convolution   k^2 n d                                k x k places
"""

from ml_collections import ConfigDict

from crossmae_jax import masking
from crossmae_jax.cost import counting
from crossmae_jax.models import fusion, vit
from crossmae_jax.tokens import grid_size
from tests import cost_swin


def _linear(fan_in: int, fan_out: int) -> int:
    """Parameters of a linear layer with bias; its MACs per token but for the bias."""
    return fan_in * fan_out + fan_out


def _block_macs(num_tokens: int, dim: int, hidden: int) -> int:
    attention = 4 * num_tokens * dim**2 + 2 * num_tokens**2 * dim
    return attention + 2 * num_tokens * dim * hidden


def _block_params(dim: int, hidden: int) -> int:
    norms = 2 * 2 * dim
    attention = _linear(dim, 3 * dim) + _linear(dim, dim)
    return norms + attention + _linear(dim, hidden) + _linear(hidden, dim)


def _mae_decoder(model: ConfigDict, dim: int, num_keys: int, num_tokens: int):
    """Returns MACs and parameters between the encoder and the last linear layer."""
    wide = model.decoder.dim
    hidden = int(wide * model.decoder.mlp_ratio)
    macs = num_keys * dim * wide
    macs += model.decoder.depth * _block_macs(num_tokens, wide, hidden)
    params = _linear(dim, wide) + model.decoder.depth * _block_params(wide, hidden)
    return macs, params


def _cross_decoder(
    model: ConfigDict, dim: int, num_keys: int, num_pred: int, num_maps: int
):
    """Returns MACs and parameters between the encoder and the last linear layer.

    `num_maps` is 0 where the decoder reads the encoder's last map only.
    """
    wide, depth = model.decoder.dim, model.decoder.depth
    hidden = int(wide * model.decoder.mlp_ratio)
    macs = 2 * num_pred * wide**2 + 2 * num_keys * dim * wide  # q and proj; k and v
    macs += 2 * num_pred * num_keys * wide + 2 * num_pred * wide * hidden
    params = 2 * 2 * wide + 2 * _linear(wide, wide) + _linear(dim, 2 * wide)
    params += _linear(wide, hidden) + _linear(hidden, wide)
    if model.decoder.self_attention:
        macs += 4 * num_pred * wide**2 + 2 * num_pred**2 * wide
        params += 2 * wide + _linear(wide, 3 * wide) + _linear(wide, wide)
    macs, params = depth * macs, depth * params
    if num_maps:
        macs += num_keys * dim * num_maps * depth
        params += num_maps * depth + depth * 2 * dim
    return macs, params


def _aggregator(model: ConfigDict, dim: int, num_patches: int, num_keep: int):
    """Returns MACs and parameters up to the last linear layer, which is the decoder's.

    Both are 0 without an aggregator.
    """
    options, wide = model.aggregator, model.decoder.dim
    hidden, macs, params = int(wide * model.decoder.mlp_ratio), 0, 0
    if options.kind in ("conv", "convnext"):
        num_taps = options.kernel_size**2
        macs, params = num_taps * num_patches * wide, num_taps * wide + wide
    if options.kind == "convnext":
        macs += 2 * num_patches * wide * hidden
        params += 2 * wide + _linear(wide, hidden) + _linear(hidden, wide)
    if options.kind == "transformer":
        macs = _block_macs(num_patches, wide, hidden)
        params = _block_params(wide, hidden)
    if options.kind != "none" and options.visible == "encoder":
        macs += num_keep * dim * wide
        params += _linear(dim, wide)
    return macs, params


def _refreshing(
    config: ConfigDict, encoder: vit.Size, num_patches: int, patch_dim: int
):
    """Returns MACs of an image seen whole, and after how many epochs all are."""
    every = config.attention_maps.every_epochs
    hidden = int(encoder.dim * config.model.encoder.mlp_ratio)
    macs = num_patches * patch_dim * encoder.dim
    macs += encoder.depth * _block_macs(num_patches + 1, encoder.dim, hidden)
    if not every:
        return None
    passes = -int(-config.epochs // every) - 1  # none at the end
    return counting.Refresh(macs, passes, config.epochs)


def simmim(config: ConfigDict) -> counting.Cost:
    """Returns what SimMIM's ViT costs: all in the encoder, and one layer behind it."""
    model, channels, masks = config.model, config.data.channels, config.masking
    size, patch_size = vit.parse_size(model.encoder.size)
    rows, columns = grid_size(tuple(config.data.image_size), patch_size)
    num_patches, patch_dim = rows * columns, patch_size**2 * channels
    num_units = num_patches // masks.unit**2
    num_keep = int(num_units * (1 - masks.mask_ratio)) * masks.unit**2
    num_thrown = round(num_patches * masks.throw_ratio)
    if masks.throw_by == "unit":
        num_thrown = round(num_units * masks.throw_ratio) * masks.unit**2
    num_pred = num_patches - num_keep - num_thrown
    dim, hidden = size.dim, int(size.dim * model.encoder.mlp_ratio)
    tokens = 1 + num_keep + num_pred
    encoder_macs = num_patches * patch_dim * dim
    encoder_macs += size.depth * _block_macs(tokens, dim, hidden)
    # No bias of keys, and a scale behind each branch.
    block = _block_params(dim, hidden) - dim + 2 * dim
    # Patches, class and mask token, norm, and a bias for each offset and head.
    encoder_params = _linear(patch_dim, dim) + 2 * dim + 2 * dim + size.depth * block
    if model.encoder.relative_bias == "shared":
        encoder_params += ((2 * rows - 1) * (2 * columns - 1) + 3) * size.num_heads
    if model.encoder.positions == "learned":
        encoder_params += (num_patches + 1) * dim
    aggregates = model.aggregator.kind != "none"
    thrown_macs = num_thrown * dim * patch_dim * aggregates
    taps = model.aggregator.kernel_size**2 * aggregates
    aggregator_macs = taps * num_patches * dim + thrown_macs
    macs = encoder_macs + (num_keep + num_pred) * dim * patch_dim + aggregator_macs
    return counting.Cost(
        num_patches=num_patches, num_keep=num_keep, num_pred=num_pred,
        num_thrown=num_thrown, decoder_tokens=0,
        parts={
            "encoder": counting.Part(encoder_macs, encoder_params),
            "decoder": counting.Part(
                (num_keep + num_pred) * dim * patch_dim, _linear(dim, patch_dim)
            ),
            "aggregator": counting.Part(
                aggregator_macs, (taps * dim + dim) * aggregates
            ),
        },
        others={},
        refresh=_refreshing(config, size, num_patches, patch_dim),
        differentiated=macs,
        computed=macs - (num_patches - num_keep) * patch_dim * dim
        - num_keep * dim * patch_dim,
    )


def _cell_head(num_patches: int, wide: int, factor: float, width: int):
    """Returns MACs and parameters from decoder tokens to the cells of a scale."""
    macs, params, dim, places = 0, 0, wide, num_patches
    for features in {4: (wide // 2, wide // 4), 2: (wide // 2,)}.get(factor, ()):
        macs += places * dim * 4 * features
        params += dim * 4 * features + features
        dim, places = features, 4 * places
    if factor == 4:
        params += 2 * (wide // 2)
    places = int(num_patches * factor**2)
    return macs + places * dim * width, params + _linear(dim, width)


def local(config: ConfigDict) -> counting.Cost:
    """Returns what LocalMIM costs: MAE's encoder, and a small decoder for each scale.
    """
    model, target, channels = config.model, config.target, config.data.channels
    size, patch_size = vit.parse_size(model.encoder.size)
    rows, columns = grid_size(tuple(config.data.image_size), patch_size)
    num_patches, patch_dim = rows * columns, patch_size**2 * channels
    num_keep, num_pred, num_thrown = masking.token_counts(
        num_patches, mask_ratio=config.masking.mask_ratio,
        pred_ratio=config.masking.pred_ratio, throw_ratio=config.masking.throw_ratio,
    )
    dim, wide, tokens = size.dim, model.decoder.dim, 1 + num_keep + num_pred
    hidden = int(dim * model.encoder.mlp_ratio)
    encoder_macs = num_patches * patch_dim * dim
    encoder_macs += size.depth * _block_macs(num_keep + 1, dim, hidden)
    encoder_params = _linear(patch_dim, dim) + dim
    encoder_params += size.depth * _block_params(dim, hidden)
    macs, params = 0, len(target.cells) * 2 * dim  # norms of the blocks' outputs
    for cell in target.cells:
        middle = _mae_decoder(model, dim, num_keep + 1, tokens)
        head = _cell_head(
            num_patches, wide, patch_size / cell, target.bins * channels
        )
        macs += middle[0] + head[0]
        params += middle[1] + head[1] + wide + 2 * wide  # mask token, norm
    taps = model.aggregator.kernel_size**2 * (model.aggregator.kind != "none")
    mixed = len(target.cells) * taps
    aggregator = counting.Part(mixed * num_patches * wide, (mixed + 4) * wide * (
        taps > 0
    ))
    everything = encoder_macs + macs + aggregator.macs
    return counting.Cost(
        num_patches=num_patches, num_keep=num_keep, num_pred=num_pred,
        num_thrown=num_thrown, decoder_tokens=tokens,
        parts={
            "encoder": counting.Part(encoder_macs, encoder_params),
            "decoder": counting.Part(macs, params), "aggregator": aggregator,
        },
        others={"constants": (num_patches + 1) * (dim + len(target.cells) * wide)},
        differentiated=everything,
        computed=everything - (num_patches - num_keep) * patch_dim * dim,
    )


def _teacher(config: ConfigDict, num_patches: int, patch_dim: int):
    """Returns MACs and parameters of a frozen ViT that sees the whole image."""
    size, _ = vit.parse_size(config.target.encoder.size)
    hidden = int(size.dim * config.target.encoder.mlp_ratio)
    macs = num_patches * patch_dim * size.dim
    macs += size.depth * _block_macs(num_patches + 1, size.dim, hidden)
    macs += (1 + config.target.top_k) * (num_patches + 1) * size.dim  # rows looked at
    params = _linear(patch_dim, size.dim) + size.dim + (num_patches + 1) * size.dim
    return macs, params + size.depth * _block_params(size.dim, hidden)


def tec(config: ConfigDict) -> counting.Cost:
    """Returns what TEC costs: an adapter, a decoder that runs twice, and a teacher."""
    model, masks, target = config.model, config.masking, config.target
    size, patch_size = vit.parse_size(model.encoder.size)
    rows, columns = grid_size(tuple(config.data.image_size), patch_size)
    num_patches, patch_dim = rows * columns, patch_size**2 * config.data.channels
    num_keep, num_pred, num_thrown = masking.token_counts(
        num_patches, mask_ratio=masks.mask_ratio, pred_ratio=masks.pred_ratio,
        throw_ratio=masks.throw_ratio,
    )
    dim, wide, keys = size.dim, model.decoder.dim, num_keep + 1
    hidden, tokens = int(dim * model.encoder.mlp_ratio), keys + num_pred
    encoder_macs = num_patches * patch_dim * dim
    encoder_macs += size.depth * _block_macs(keys, dim, hidden)
    encoder_macs += 2 * (dim * hidden // config.data.batch_size)  # one class token
    encoder_params = _linear(patch_dim, dim) + dim + 2 * dim
    encoder_params += size.depth * _block_params(dim, hidden)
    encoder_params += _linear(dim, hidden) + _linear(hidden, dim)
    groups, wider = model.fusion.groups, model.fusion.hidden
    macs = keys * (size.depth * dim**2 + groups * 2 * dim * wider)
    params = 2 * size.depth * dim + 2 * dim + groups * (
        _linear(size.depth // groups * dim, dim) + _linear(dim, wider)
        + _linear(wider, dim)
    )
    once = _mae_decoder(model, dim, keys, tokens)
    macs += 2 * once[0]
    params += once[1] + _linear(dim, wide) + 2 * (wide + 2 * wide)  # tokens, norms
    aggregates = model.aggregator.kind != "none"
    width = vit.parse_size(target.encoder.size)[0].dim
    macs += (num_pred + num_thrown * aggregates) * wide * width
    macs += (num_patches + 1) * wide * 2 * width + (
        (1 + target.top_k) * num_patches * width
    )
    params += _linear(wide, width) + _linear(wide, 2 * width)
    taps = 2 * model.aggregator.kernel_size**2 * aggregates
    aggregator = counting.Part(
        taps * num_patches * wide, (taps + 2 * aggregates) * wide
    )
    teacher_macs, teacher_params = _teacher(config, num_patches, patch_dim)
    trained = encoder_macs + macs + aggregator.macs
    return counting.Cost(
        num_patches=num_patches, num_keep=num_keep, num_pred=num_pred,
        num_thrown=num_thrown, decoder_tokens=2 * tokens,
        parts={
            "encoder": counting.Part(encoder_macs, encoder_params),
            "decoder": counting.Part(macs, params), "aggregator": aggregator,
            "teacher": counting.Part(teacher_macs, 0),
        },
        others={
            "constants": (num_patches + 1) * (dim + wide), "teacher": teacher_params
        },
        differentiated=trained,
        computed=trained + teacher_macs - (num_patches - num_keep) * patch_dim * dim,
    )


def pretraining(config: ConfigDict) -> counting.Cost:
    """Returns what a masked model costs, by the formulas."""
    if config.model.decoder.kind == "tec":
        return tec(config)
    if config.model.encoder.kind == "swin":
        return cost_swin.pretraining(config)
    if config.model.encoder.mask_tokens:
        return simmim(config)
    if config.model.decoder.kind == "local":
        return local(config)
    model, channels = config.model, config.data.channels
    size, patch_size = vit.parse_size(model.encoder.size)
    rows, columns = grid_size(tuple(config.data.image_size), patch_size)
    num_patches, patch_dim = rows * columns, patch_size**2 * channels
    num_keep, num_pred, num_thrown = masking.token_counts(
        num_patches, mask_ratio=config.masking.mask_ratio,
        pred_ratio=config.masking.pred_ratio,
        throw_ratio=config.masking.throw_ratio, rounding=config.masking.rounding,
    )
    dim, wide = size.dim, model.decoder.dim
    hidden = int(dim * model.encoder.mlp_ratio)
    num_maps = 0
    if model.fusion.kind == "inter_block":
        num_maps = len(fusion.resolve_maps(
            model.fusion.maps, depth=size.depth, include_input=model.fusion.input
        ))

    encoder_macs = num_patches * patch_dim * dim
    encoder_macs += size.depth * _block_macs(num_keep + 1, dim, hidden)
    encoder_params = _linear(patch_dim, dim) + dim  # patches, class token
    encoder_params += size.depth * _block_params(dim, hidden)
    if model.fusion.kind == "last":
        encoder_params += 2 * dim  # final norm

    aggregates = model.aggregator.kind != "none"
    if model.decoder.kind == "mae":
        decoder_tokens = 1 + num_keep + num_pred
        macs, params = _mae_decoder(model, dim, num_keep + 1, decoder_tokens)
        num_unread = num_keep if aggregates else num_keep + 1
    else:
        decoder_tokens, num_unread = num_pred, 0
        macs, params = _cross_decoder(model, dim, num_keep + 1, num_pred, num_maps)
    if model.fusion.kind == "multi_level":
        num_projected = len(model.fusion.maps) - 1  # the last one is mixed as it is
        macs += num_projected * (num_keep + 1) * dim**2
        params += num_projected * _linear(dim, dim) + len(model.fusion.maps) + 2 * dim
    aggregator_macs, aggregator_params = _aggregator(model, dim, num_patches, num_keep)
    if aggregates:
        aggregator_macs += num_thrown * wide * patch_dim
    decoder_macs = macs + (num_pred + num_unread) * wide * patch_dim
    all_macs = encoder_macs + decoder_macs + aggregator_macs
    # What the references compute and this library leaves out: the projection of hidden
    # patches, and the last layer for visible tokens.
    left_out = (num_patches - num_keep) * patch_dim * dim
    left_out += num_unread * wide * patch_dim
    return counting.Cost(
        num_patches=num_patches,
        num_keep=num_keep,
        num_pred=num_pred,
        num_thrown=num_thrown,
        decoder_tokens=decoder_tokens,
        parts={
            "encoder": counting.Part(encoder_macs, encoder_params),
            # Mask token, blocks and fusion, last norm, last linear layer.
            "decoder": counting.Part(
                decoder_macs, wide + params + 2 * wide + _linear(wide, patch_dim)
            ),
            "aggregator": counting.Part(aggregator_macs, aggregator_params),
        },
        others={"constants": (num_patches + 1) * (dim + wide)},  # position tables
        refresh=_refreshing(config, size, num_patches, patch_dim),
        differentiated=all_macs,
        computed=all_macs - left_out,
    )


def classification(config: ConfigDict, *, differentiated: int) -> counting.Cost:
    """Returns what a classifier of whole images costs, by the formulas."""
    model, data = config.model, config.data
    size, patch_size = vit.parse_size(model.encoder.size)
    rows, columns = grid_size(tuple(data.image_size), patch_size)
    num_patches, patch_dim = rows * columns, patch_size**2 * data.channels
    dim, hidden = size.dim, int(size.dim * model.encoder.mlp_ratio)
    encoder_macs = num_patches * patch_dim * dim
    encoder_macs += size.depth * _block_macs(num_patches + 1, dim, hidden)
    encoder_params = _linear(patch_dim, dim) + dim + (num_patches + 1) * dim
    encoder_params += size.depth * _block_params(dim, hidden)
    head_params, norm = _linear(dim, data.num_classes), 2 * dim
    if model.pool == "cls":
        encoder_params += norm
    else:
        head_params += norm
    return counting.Cost(
        num_patches=num_patches,
        num_keep=num_patches,
        num_pred=0,
        num_thrown=0,
        decoder_tokens=0,
        parts={
            "encoder": counting.Part(encoder_macs, encoder_params),
            "head": counting.Part(dim * data.num_classes, head_params),
        },
        others={"batch_stats": 2 * dim} if model.head_norm == "batch" else {},
        differentiated=differentiated,
        computed=encoder_macs + dim * data.num_classes,
    )
