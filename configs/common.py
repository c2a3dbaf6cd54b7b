"""What the experiments share: the recipe of MAE and CrossMAE, as plain dicts.

Every key that the library reads is here, so that a misspelt override is an error.
A `placeholder` is an unset value (None) of a known type.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pretrain(*, epochs: float, warmup_epochs: float, seed: int = 0) -> ConfigDict:
    """Returns the recipe of MAE, appendix A.1, and CrossMAE, table 10.

    An experiment adds `model`, `masking`, `data` and `evals`. An evaluator that is not
    named in `evals` does not run; `every_epochs=0.0` runs it once, at the end.
    """
    return ConfigDict(dict(
        seed=seed,
        objective="pretrain",
        epochs=epochs,
        log_every_steps=50,
        watchdog_minutes=30.0,  # without a sign of life, then the run ends; 0: never
        log_norms=False,  # of gradients and updates, for every block
        init_from="",  # weights of any format to start from, see docs/weights.md
        init_channels="",  # "mean", "repeat", "sum": for another number of channels
        attention_maps=attention_maps(every_epochs=0.0),
        target=dict(kind="pixels", normalize=True),
        loss=dict(
            kind="mse",  # of all targets, or a dict of kinds by their names
            thrown_weight=1.0,  # against 1 for patches that were decoded
            weights={},  # of targets, by their names; 1 where there is none
        ),
        optim=dict(
            name="adamw",  # or "lars"
            trust_coefficient=0.001,  # of LARS: share of a weight's norm in an update
            base_lr=1.5e-4,  # for a batch of
            base_batch=256,
            # CrossMAE's factor pred_ratio / mask_ratio; 1 for MAE, which predicts all.
            lr_scale="pred_over_mask",
            schedule="cosine",  # to `min_lr`; or "step": at each of `drop_epochs`
            min_lr=0.0,
            drop_epochs=(),
            drop_factor=0.1,  # what the rate is multiplied with
            warmup_lr=0.0,  # of the first step
            warmup_epochs=warmup_epochs,
            weight_decay=0.05,
            decay_tokens=True,  # tokens and trained positions, as matrices do
            b1=0.9,
            b2=0.95,
            clip_norm=placeholder(float),
            accum_steps=1,
            layer_decay=1.0,  # rate of a block, over that of the next one
            # Steps whose loss or gradient is not finite, which change nothing: so many
            # in a row end the run.
            max_skipped_in_a_row=5,
        ),
        checkpoint=dict(
            every_epochs=1.0,
            keep=2,  # the newest ones
            keep_every_epochs=0.0,  # and, for good, those of such epochs; 0.0: none
            best="",
        ),
        # Devices that share one copy of weights and moments; 1: whole on each; 0: as
        # many as their memory asks for.
        mesh=dict(fsdp=0),
        baselines=False,
    ))


def finetune(*, epochs: float, warmup_epochs: float = 5.0, seed: int = 0) -> ConfigDict:
    """Returns the recipe of MAE's fine-tuning, appendix A.1 and its published script.

    An experiment adds `model`, `data` and `evals`, and may change `optim.base_lr` and
    `optim.layer_decay`, which go with the size. The number of classes is that of the
    training data.
    """
    config = pretrain(epochs=epochs, warmup_epochs=warmup_epochs, seed=seed)
    for name in ("attention_maps", "target", "loss"):
        del config[name]
    config.objective = "classify"
    config.tune_blocks = placeholder(float)  # so many last blocks; unset: everything
    config.optim.update(dict(
        base_lr=5e-4, lr_scale="none", min_lr=1e-6, decay_tokens=False, b2=0.999,
        layer_decay=0.65,
    ))
    config.augment = dict(
        label_smoothing=0.1,
        erasing=0.25,  # share of the images that lose a box
        mixup=0.8,  # parameters of beta distributions; 0.0 turns one off
        cutmix=1.0,
        mixed_together=32,  # images with a draw in common: a GPU's share, in MAE
    )
    config.checkpoint.best = "eval/accuracy/top1"
    return config


def linear_probe(*, epochs: float, warmup_epochs: float = 10.0) -> ConfigDict:
    """Returns the recipe of MAE's linear probing, appendix A.1."""
    config = finetune(epochs=epochs, warmup_epochs=warmup_epochs)
    config.tune_blocks = 0.0
    config.optim.update(dict(
        name="lars", base_lr=0.1, min_lr=0.0, weight_decay=0.0, layer_decay=1.0
    ))
    config.augment.update(dict(label_smoothing=0.0, erasing=0.0, mixup=0.0, cutmix=0.0))
    return config


def vit(size: str) -> dict[str, Any]:
    """Returns MAE's encoder."""
    return dict(
        kind="vit", size=size, mlp_ratio=4.0,
        drop_path=0.0,  # rate of stochastic depth in the last block; from 0 linearly
        positions="sincos",  # or "learned", "none"
        relative_bias="none",  # or "shared" by all blocks, "per_block"
        qkv_bias="qkv",  # which of queries, keys and values have one; "qv", "none"
        layer_scale=placeholder(float),  # to start with, such as 0.1; unset: none
        mask_tokens=False,  # SimMIM: masked patches are tokens of the encoder
        cls_token_mlp=False,  # TEC: the class token passes an MLP
        weight_init="xavier",  # how matrices are drawn; "truncated" as in SimMIM
    )


def simmim_vit(size: str, *, drop_path: float) -> dict[str, Any]:
    """Returns SimMIM's ViT, which is BEiT's: places are told by a bias."""
    return vit(size) | dict(
        drop_path=drop_path, positions="none", relative_bias="shared", qkv_bias="qv",
        layer_scale=0.1, weight_init="truncated",
    )


def swin(
    size: str, *, window: int, drop_path: float = 0.0, norm_epsilon: float = 1e-5
) -> dict[str, Any]:
    """Returns Swin: attention in windows of so many cells a side, in four stages."""
    return dict(
        kind="swin", size=size, window=window, mlp_ratio=4.0, drop_path=drop_path,
        mask_tokens=False, weight_init="normal", norm_epsilon=norm_epsilon,
    )


def classifier(size: str, *, drop_path: float = 0.0) -> dict[str, Any]:
    """Returns an encoder whose patch tokens are averaged, normed and classified."""
    return dict(
        encoder=vit(size) | dict(drop_path=drop_path),
        pool="mean",  # or "cls", with the encoder's final norm
        head_norm="none",  # "batch" in linear probing
        head_std=2e-5,
        remat="selective",
        dtype="bfloat16",
    )


def probed(size: str) -> dict[str, Any]:
    """Returns an encoder whose class token is normed by the batch and classified."""
    return classifier(size) | dict(pool="cls", head_norm="batch", head_std=0.01)


def no_aggregator(*, visible: str) -> dict[str, Any]:
    """Returns PR-MIM's part, which predicts thrown patches, turned off.

    Args:
      visible: what it would see at visible places.
    """
    return dict(kind="none", kernel_size=7, visible=visible, rewrites_retained=False)


def crossmae(
    size: str, *, decoder_dim: int, decoder_heads: int, decoder_depth: int = 12
) -> dict[str, Any]:
    """Returns CrossMAE's model: cross-attention to a mixture of all feature maps."""
    return dict(
        encoder=vit(size),
        fusion=dict(
            kind="inter_block",
            maps=placeholder(tuple),  # unset: all blocks
            input=True,
        ),
        decoder=dict(
            kind="cross", dim=decoder_dim, depth=decoder_depth,
            num_heads=decoder_heads, mlp_ratio=4.0, self_attention=False,
        ),
        aggregator=no_aggregator(visible="encoder"),
        remat="selective",  # what gradients compute again: "none", "selective", "full"
        dtype="bfloat16",
    )


def mae(
    size: str, *, decoder_dim: int, decoder_heads: int, decoder_depth: int = 8
) -> dict[str, Any]:
    """Returns MAE's model: self-attention over visible and mask tokens."""
    model = crossmae(
        size, decoder_dim=decoder_dim, decoder_heads=decoder_heads,
        decoder_depth=decoder_depth,
    )
    model["fusion"]["kind"], model["decoder"]["kind"] = "last", "mae"
    model["aggregator"]["visible"] = "decoder"
    return model


def simmim(size: str) -> dict[str, Any]:
    """Returns SimMIM's model: a layer behind an encoder that sees mask tokens."""
    encoder = simmim_vit(size, drop_path=0.1)
    return dict(
        encoder=encoder | dict(mask_tokens=True),
        fusion=dict(kind="last"),
        decoder=dict(
            kind="linear",
            norm=False,  # True: the final norm stands behind an aggregator
        ),
        aggregator=no_aggregator(visible="decoder"),
        remat="selective",
        dtype="bfloat16",
    )


def simmim_swin(size: str, *, window: int) -> dict[str, Any]:
    """Returns SimMIM's model with Swin: a layer predicts a square of 32 pixels."""
    return simmim(size) | dict(
        encoder=swin(size, window=window) | dict(mask_tokens=True)
    )


def green(size: str, *, window: int) -> dict[str, Any]:
    """Returns GreenMIM's model: Swin on visible squares, a decoder of one block."""
    model = mae(size, decoder_dim=512, decoder_heads=16, decoder_depth=1)
    encoder = swin(size, window=window, norm_epsilon=1e-6)
    return model | dict(encoder=encoder | dict(weight_init="xavier"))


def local(size: str) -> dict[str, Any]:
    """Returns LocalMIM's model: small decoders of four blocks, a scale each."""
    model = mae(size, decoder_dim=256, decoder_heads=8, decoder_depth=1)
    model["fusion"].update(kind="taps", maps=(1, 3, -3, -1))
    model["decoder"]["kind"] = "local"
    return model


def hog(*, bins: int = 9) -> dict[str, Any]:
    """Returns LocalMIM's target: oriented gradients, in cells of four sizes."""
    return dict(
        kind="hog", bins=bins,  # or "pixels" of the same cells
        cells=(4, 8, 16, 32),  # sides in pixels
        bias=False,  # adds drawn numbers to the gradients, as the code of ViT-L does
        normalize=True,  # of pixels: each cell is standardised
    )


def tec(
    size: str, *, decoder_dim: int = 512, decoder_heads: int = 16, groups: int = 4
) -> dict[str, Any]:
    """Returns TEC's model: an adapter, and a decoder that runs twice.

    Args:
      groups: of the encoder's blocks, three each in the paper.
    """
    model = mae(
        size, decoder_dim=decoder_dim, decoder_heads=decoder_heads, decoder_depth=2
    )
    model["encoder"]["cls_token_mlp"] = True
    model["fusion"] = dict(kind="adapter", groups=groups, hidden=4 * decoder_dim)
    model["decoder"]["kind"] = "tec"
    return model


def teacher(
    size: str, *, top_k: int = 15, temperature: float = 1.8
) -> dict[str, Any]:
    """Returns TEC's target: a frozen ViT's features and attention.

    Args:
      top_k: patches whose attention is predicted, beside the class token's.
      temperature: that attention is divided by. Both are those of MAE's ViT-B.
    """
    return dict(
        kind="teacher",
        weights="",  # of any format; must be given where a run begins
        encoder=vit(size),
        blocks=2,  # whose mean output is predicted, of the last ones
        top_k=top_k,
        temperature=temperature,
        attention="scores",  # what is divided; or "probs", behind a softmax
    )


def tec_loss() -> dict[str, Any]:
    """Returns TEC's loss: of features at masked patches, of attention at chosen ones.
    """
    return dict(
        kind=dict(feature="mse", attention="cross_entropy"), thrown_weight=1.0,
        weights=dict(feature=1.0, attention=1.0),
    )


def attention_maps(
    *, every_epochs: float, mask_ratio: float = 0.75
) -> dict[str, Any]:
    """Returns how often AMT looks where the model looks, in all training images.

    It goes with `masking.noise="weighted"` and `data.transform="weighted"`.

    Args:
      every_epochs: so many epochs apart; 0.0 for all methods without.
      mask_ratio: of plain masking, until it has looked for the first time.
    """
    return dict(
        every_epochs=every_epochs,
        before=dict(mask_ratio=mask_ratio, pred_ratio=mask_ratio, throw_ratio=0.0),
    )


def masking(
    *,
    mask_ratio: float = 0.75,
    pred_ratio: float,
    throw_ratio: float = 0.0,
    retain: str = "random",
) -> dict[str, Any]:
    """Returns how many patches are hidden, predicted and thrown, all of all patches.

    Args:
      throw_ratio: left out of the decoder. Without an aggregator they are not predicted
        either: plain throwing.
      retain: which masked patches the decoder keeps, "random" or "furthest".
    """
    return dict(
        mask_ratio=mask_ratio,
        pred_ratio=pred_ratio,
        throw_ratio=throw_ratio,
        retain=retain,
        # What orders the patches. "weighted" by what the model looks at, or "shared":
        noise="uniform",
        together=1,  # of so many images of a batch in a row
        unit=1,  # what is masked as one: squares of so many patches a side
        throw_by="patch",  # what is thrown as one; or "unit"
        rounding="floor",  # of the number of visible ones; or "ceil"
    )


def images(
    *,
    source: str,
    image_size: tuple[int, int],
    batch_size: int,
    channels: int = 3,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    name: str = "",
    eval_split: str = "",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
) -> dict[str, Any]:
    """Returns where images come from and how they are cropped and normalised.

    Args:
      source: "tfds", "folder" or "digits".
      mean: per channel, for pixels in 0..1; likewise `std`.
      crop_scale: share of the image's area that a random crop covers.
    """
    return dict(
        source=source,
        name=name,  # tfds: the data set, its directory and its splits
        data_dir=placeholder(str),
        split="train",
        eval_split=eval_split,  # "": nothing to evaluate on
        dir=placeholder(str),  # folder: images to train on, and to evaluate on
        eval_dir=placeholder(str),
        image_size=image_size,
        channels=channels,
        mean=mean,
        std=std,
        batch_size=batch_size,
        # A crop of the image, and its label if it has one; "weighted": and the weights
        transform="classification",
        weights_grid=placeholder(tuple),  # of so many rows and columns of patches
        crop="ten_tries",  # "single_try" is the linear probe's
        crop_scale=crop_scale,
        flip=flip,
        interpolation="bicubic",  # of random crops; or "bilinear"
        randaug_ops=0,  # operations of RandAugment on an image
        randaug_magnitude=9.0,
        eval_crop_ratio=0.875,  # 224 / 256
        workers=-1,  # -1: chosen from the CPU count; 0: threads of this process
        max_skipped_share=0.05,  # folder: of images of a kind that is not read
        max_bad_share=0.001,  # of images that cannot be decoded and are replaced
        max_pixels=178_956_970,  # of an image that is decoded: PIL's own limit
    )


def imagenet(*, image_size: tuple[int, int], batch_size: int) -> dict[str, Any]:
    """Returns ImageNet-1k (ILSVRC 2012), as a TFDS data set."""
    return images(
        source="tfds", name="imagenet2012", eval_split="validation",
        image_size=image_size, batch_size=batch_size,
    )


def labelled(data: dict[str, Any], *, randaug_ops: int = 2) -> dict[str, Any]:
    """Returns data to classify: cropped and changed as in MAE's fine-tuning."""
    data["crop_scale"] = (0.08, 1.0)
    data["randaug_ops"] = randaug_ops
    return data | dict(num_classes=placeholder(int))  # unset: those of the data


def accuracy(*, every_epochs: float = 1.0) -> dict[str, Any]:
    """Returns the evaluator of a classifier; it needs labels."""
    return dict(accuracy=dict(every_epochs=every_epochs))


def panels(*, every_epochs: float = 10.0) -> dict[str, Any]:
    """Returns the evaluator that draws reconstructions; it needs no labels."""
    return dict(reconstruction=dict(every_epochs=every_epochs, num_images=8))


def rank(*, every_epochs: float = 10.0) -> dict[str, Any]:
    """Returns the effective rank of the features; it needs no labels.

    10 000 images are many more than the widest model has channels, 1280.
    """
    return dict(rank=dict(every_epochs=every_epochs, max_images=10_000))


def knn(
    *, every_epochs: float = 50.0, pools: tuple[str, ...] = ("mean", "cls")
) -> dict[str, Any]:
    """Returns the k-NN classifier on frozen features; it needs labels.

    k and temperature as in DINO, arXiv 2104.14294, with k = 20. A tenth of
    ImageNet is enough to watch a run.
    """
    return dict(knn=dict(
        every_epochs=every_epochs,
        k=(20,),  # DINO's others: (20, 10, 100, 200), all of one search
        pools=pools,  # of patch tokens, and the class token, if there is one
        temperature=0.07,
        max_train_images=128_000,
    ))
