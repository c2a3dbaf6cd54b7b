"""What a configuration costs, counted: multiply-adds, tokens, parameters.

Multiply-adds (MACs) of one image's forward pass, for n tokens of width d and an MLP of
ratio r:

    self-attention block     (4 + 2r) n d^2 + 2 n^2 d
    cross-attention block    (2 + 2r) q e^2 + 2 k d e + 2 q k e     q queries of width e
    depth-wise convolution   k^2 n d                                k x k places

Only matrix products and convolutions count, as in the literature: no norms, softmax,
GELU or biases. One multiply-add is what papers call a FLOP; a device's peak counts it
as two. A training step is taken as three forward passes.

An aggregator (PR-MIM, arXiv 2411.15746) stands for all that thrown patches cost: the
mixing of places, which runs over the whole grid, the projection of visible features
that are mixed in, and the last linear layer on the thrown patches.

Two counts follow the references where this library does less: the patch projection is
counted for every patch (here it runs on the visible ones), and MAE's last layer for
every token of the decoder (here for the predicted patches); where an aggregator lays
the tokens out on the grid, for all but the class token. The tables of CrossMAE (arXiv
2401.14391) and its relatives are then reproduced, and a share of a device's peak is
comparable between libraries.
"""

import dataclasses

from ml_collections import ConfigDict

from crossmae_jax import masking, patches
from crossmae_jax.models import fusion, mim, vit


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one image's forward pass in training, and the size of the model.

    Attributes:
      num_pred: patches that the decoder predicts; likewise `num_thrown`, which an
        aggregator predicts or nothing does.
      decoder_tokens: tokens that the decoder's blocks run on.
      decoder_macs: inter-block attention included; likewise `decoder_params`.
      aggregator_macs: 0 without an aggregator; likewise `aggregator_params`.
      table_params: fixed position tables, which are not trained.
    """

    num_patches: int
    num_keep: int
    num_pred: int
    num_thrown: int
    decoder_tokens: int
    encoder_macs: int
    decoder_macs: int
    aggregator_macs: int
    encoder_params: int
    decoder_params: int
    aggregator_params: int
    table_params: int

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass."""
        return self.encoder_macs + self.decoder_macs + self.aggregator_macs

    @property
    def train_flops(self) -> int:
        """Floating-point operations of a training step: 3 passes, 2 a multiply-add."""
        return 3 * 2 * self.macs

    @property
    def params(self) -> int:
        """All numbers of the model, trained or not."""
        trained = self.encoder_params + self.decoder_params + self.aggregator_params
        return trained + self.table_params


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
    wide, hidden = model.decoder_dim, int(model.decoder_dim * model.mlp_ratio)
    macs = num_keys * dim * wide
    macs += model.decoder_depth * _block_macs(num_tokens, wide, hidden)
    params = _linear(dim, wide) + model.decoder_depth * _block_params(wide, hidden)
    return macs, params


def _cross_decoder(
    model: ConfigDict, dim: int, num_keys: int, num_pred: int, num_maps: int
):
    """Returns MACs and parameters between the encoder and the last linear layer.

    `num_maps` is 0 where the decoder reads the encoder's last map only.
    """
    wide, depth = model.decoder_dim, model.decoder_depth
    hidden = int(wide * model.mlp_ratio)
    macs = 2 * num_pred * wide**2 + 2 * num_keys * dim * wide  # q and proj; k and v
    macs += 2 * num_pred * num_keys * wide + 2 * num_pred * wide * hidden
    params = 2 * 2 * wide + 2 * _linear(wide, wide) + _linear(dim, 2 * wide)
    params += _linear(wide, hidden) + _linear(hidden, wide)
    if model.decoder_self_attention:
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
    options, wide = model.aggregator, model.decoder_dim
    hidden, macs, params = int(wide * model.mlp_ratio), 0, 0
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


def count(config: ConfigDict) -> Cost:
    """Counts what `config.model`, `config.masking` and `config.data` describe.

    Raises:
      ValueError: if the configuration contradicts itself.
    """
    if config.get("objective", "pretrain") != "pretrain":
        raise ValueError(
            f"Only pre-training is counted, not objective={config.objective!r}; give "
            "a configuration of objective='pretrain'."
        )
    mim.build(config)  # refuses what cannot be built
    model, channels = config.model, config.data.channels
    size, patch_size = vit.parse_size(model.size)
    rows, columns = patches.grid_size(tuple(config.data.image_size), patch_size)
    num_patches, patch_dim = rows * columns, patch_size**2 * channels
    num_keep, num_pred, num_thrown = masking.token_counts(
        num_patches, mask_ratio=config.masking.mask_ratio,
        pred_ratio=config.masking.pred_ratio,
        throw_ratio=config.masking.throw_ratio,
    )
    dim, hidden, wide = size.dim, int(size.dim * model.mlp_ratio), model.decoder_dim
    num_maps = 0
    if model.fusion == "inter_block":
        num_maps = len(fusion.resolve_maps(
            model.fusion_maps, depth=size.depth, include_input=model.fusion_input
        ))

    encoder_macs = num_patches * patch_dim * dim
    encoder_macs += size.depth * _block_macs(num_keep + 1, dim, hidden)
    encoder_params = _linear(patch_dim, dim) + dim  # patches, class token
    encoder_params += size.depth * _block_params(dim, hidden)
    if not num_maps:
        encoder_params += 2 * dim  # final norm

    aggregates = model.aggregator.kind != "none"
    if model.decoder == "mae":
        decoder_tokens = 1 + num_keep + num_pred
        macs, params = _mae_decoder(model, dim, num_keep + 1, decoder_tokens)
        num_read = num_keep + num_pred if aggregates else decoder_tokens
    else:
        decoder_tokens = num_read = num_pred
        macs, params = _cross_decoder(model, dim, num_keep + 1, num_pred, num_maps)
    aggregator_macs, aggregator_params = _aggregator(model, dim, num_patches, num_keep)
    if aggregates:
        aggregator_macs += num_thrown * wide * patch_dim
    return Cost(
        num_patches=num_patches,
        num_keep=num_keep,
        num_pred=num_pred,
        num_thrown=num_thrown,
        decoder_tokens=decoder_tokens,
        encoder_macs=encoder_macs,
        decoder_macs=macs + num_read * wide * patch_dim,
        aggregator_macs=aggregator_macs,
        encoder_params=encoder_params,
        # Mask token, blocks and fusion, last norm, last linear layer.
        decoder_params=wide + params + 2 * wide + _linear(wide, patch_dim),
        aggregator_params=aggregator_params,
        table_params=(num_patches + 1) * (dim + wide),
    )
