"""Looks inside a model: images in, arrays out. `crossmae_jax.load(path)` makes one.

What it finds is computed elsewhere, by functions of variables and images: features
(`Encoded`), predictions (`objectives.pretrain`), attention (`attention_weights`), parts
of a prediction (`contributions`). Here they are compiled and given names.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

from crossmae_jax import augment, errors
from crossmae_jax.convert import structure
from crossmae_jax.convert.cards import Card
from crossmae_jax.data import transforms
from crossmae_jax.distributed import parallel
from crossmae_jax.models import watching
from crossmae_jax.objectives import pretrain
from crossmae_jax.probing import attention_weights, contributions, needs
from crossmae_jax.tokens import Encoded, Tokens


class Pretrained:
    """A model with its weights: `features = model.encode(images)`.

    Images in, numpy arrays out. Features are of whole images, without a mask.
    What a decoder makes of masked images depends on a `mask_ratio`, that of training if
    not given, and a `seed`: image i of a call has the i-th mask of the seed, or the one
    of its number in `numbers`. Images are normalised as the card says. Computation is
    float32, on one device, and compiled once per method and number of images.

    Images are uint8, `[b height width c]` of the model's size, or a list of files or
    uint8 arrays `[height width c]` of any size, which are resized to 256/224 of the
    model's and cropped at the centre, as runs evaluate unless they have set another
    `data.eval_crop_ratio`.

    Attributes:
      card: what the weights are.
      model: the Flax module of them.
      variables: the weights.

    Example:
      model = crossmae_jax.load("runs/mine")
      features = model.encode(images)  # b d
      tokens = model.tokens(images)  # b 1+n d, the class token first
      pictures = model.reconstruct(images, mask_ratio=0.5, seed=1)
    """

    def __init__(self, card: Card, variables: Any):
        needs.statistics(card)
        self.card = card
        self.variables = variables
        self.model = structure.build(card)
        self._mesh = parallel.make_mesh(jax.local_devices()[:1])  # of new arrays
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._objectives: dict[float | None, pretrain.Pretrain] = {}

    def __call__(self, images: Any) -> Float[np.ndarray, "b d"]:
        """Is `encode`."""
        return self.encode(images)

    def encode(self, images: Any) -> Float[np.ndarray, "b d"]:
        """Returns a vector per image: what the evaluations of this library use.

        That is the mean over patch tokens of the encoder's output, or of the last
        feature map that CrossMAE's decoder was trained on; of a classifier the vector
        that its head sees.
        """
        return self._encoded(images)["features"]

    def tokens(self, images: Any) -> Float[np.ndarray, "b n d"]:
        """Returns the output of the last block, after its norm if there is one.

        The class token comes first.
        """
        return self._encoded(images)["tokens"]

    def feature_maps(self, images: Any) -> Float[np.ndarray, "maps b n d"]:
        """Returns the input of the first encoder block and the output of every block.

        The class token comes first; no norm has been applied.

        Raises:
          ConversionError: if they are of several widths.
        """
        needs.whole_attention(self.card)
        return self._run("feature_maps", self._feature_maps, images)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """What the logits stand for, in their order; None if that is not known."""
        return self.card.classes

    def logits(self, images: Any) -> Float[np.ndarray, "b classes"]:
        """Returns a value per class; for fine-tuned classifiers only.

        Raises:
          ConversionError: if there is no head.
        """
        needs.head(self.card)
        return self._encoded(images)["logits"]

    def inter_block_weights(self) -> Float[np.ndarray, "i maps"]:
        """Returns how much of each feature map goes into each decoder block's context.

        The matrix W of CrossMAE (arXiv 2401.14391, section 3.4), a row per decoder
        block; of MFF one row for all of them, shares of projected maps; of LocalMIM the
        identity, for each decoder sees one map. Which maps its columns are says
        `mixed_maps`.

        Raises:
          ConversionError: if the model mixes no feature maps.
        """
        needs.fusion(self.card)
        return np.asarray(self.card.fusion.shares(self.variables["params"]["fusion"]))

    def mixed_maps(self) -> tuple[int, ...]:
        """Returns the feature maps that the decoder sees: 0 is the encoder's input."""
        self.inter_block_weights()
        return self.card.fusion.used_maps

    @property
    def caption(self) -> str:
        """What a viewer of its pictures must know.

        Raises:
          ConversionError: if there is no decoder, or the targets are not known or
            cannot be turned into pictures.
        """
        needs.target(self.card)
        target = self._objective(None).target
        needs.pictures(self.card, target)
        return target.caption

    def reconstruct(
        self, images: Any, *, mask_ratio: float | None = None, seed: int = 0,
        numbers: Integer[np.ndarray, "b"] | None = None,
        without: str | None = None, keep_own: bool = False,
    ) -> pretrain.Reconstruction:
        """Predicts every masked patch; returns pictures, masks and errors.

        Args:
          without: "masked" or "visible": takes this attention away from MAE's masked
            patches, see `attention_weights.without`; likewise `keep_own`.

        Raises:
          ConversionError: if there is no decoder, or the targets are not known or
            cannot be turned into pictures.
          ValueError: if the decoder has no such attention.
        """
        needs.target(self.card)
        needs.pictures(self.card, self._objective(mask_ratio).target)

        def reconstruct(objective, variables, images, ids):
            predicted = attention_weights.predict_without(
                without, objective.model, variables, images, ids, keep_own=keep_own
            )
            target = objective.target(variables, images)
            return objective.pictures(predicted, target, images, ids)

        name = "reconstruct", without, keep_own
        return self._masked(name, reconstruct, images, mask_ratio, seed, numbers)

    def predict(
        self, images: Any, ids: Any, *, mask_ratio: float | None = None, seed: int = 0
    ) -> Float[np.ndarray, "b q t"]:
        """Predicts the patches of these numbers [q] only, in the space of the targets.

        What is visible is that of `reconstruct` with the same ratio and seed. CrossMAE
        can be asked for visible patches, too; MAE only for masked ones. Where queries
        attend to each other, in MAE and in CrossMAE's ablation, the fewer are asked
        for, the fewer there are to attend to.

        Raises:
          ConversionError: if there is no decoder.
          ValueError: if a number is none of a patch, or MAE is asked for a visible one,
            or the model has an aggregator, or an encoder that sees masked patches.
        """
        objective = self._objective(mask_ratio)
        num, ids = objective.num_patches, np.asarray(ids)
        needs.numbers_of_patches(ids, num=num)
        if objective.model.aggregators or objective.model.decoder.reads_masked:
            raise ValueError(
                "This model has an aggregator, or an encoder with masked patches in "
                "it: predictions depend on which patches are there; use reconstruct."
            )
        needs.of_patches(self.card, objective.target, objective.model.encoder)

        def predict(objective, variables, images, drawn, ids):
            ids = jnp.broadcast_to(ids[None], (len(images), len(ids)))
            (pred,) = objective.model.apply(
                variables, images, drawn._replace(pred=ids)
            ).values()
            return pred.values, drawn.keep

        pred, keep = self._masked(
            "predict", predict, images, mask_ratio, seed, None, jnp.asarray(ids)
        )
        seen = np.intersect1d(keep, ids)
        if objective.model.decoder.needs_masked and len(seen):
            raise ValueError(
                f"Patches {seen.tolist()} are visible in some of these images, and "
                f"{objective.model.decoder.method} predicts masked ones only; leave "
                "them out, or give one image."
            )
        return pred

    def after_each_block(
        self, images: Any, *, mask_ratio: float | None = None, seed: int = 0
    ) -> tuple[pretrain.Reconstruction, ...]:
        """Returns pictures of the prediction as it is after each decoder block.

        The first is what the decoder's input alone gives, the last the prediction; see
        `contributions`. What a block adds, in pixels, is the difference of its
        `prediction` and the one before.

        Raises:
          ConversionError: if there is no decoder, or the targets are not known.
          ValueError: if the model has an aggregator.
        """
        needs.target(self.card)
        needs.pictures(self.card, self._objective(mask_ratio).target)
        needs.blocks(self.card, self.model.decoder)

        def after(objective, variables, images, ids):
            parts = contributions.contributions(
                objective.model, variables, images, ids
            )
            (name,) = objective.target.widths
            target = objective.target(variables, images)
            return tuple(
                objective.pictures(
                    {name: Tokens(pred, ids.pred, objective.grid)}, target, images, ids
                )
                for pred in contributions.cumulative(parts)
            )

        return self._masked("after_each_block", after, images, mask_ratio, seed)

    def attention_maps(
        self, images: Any, *, part: str = "decoder",
        mask_ratio: float | None = None, seed: int = 0,
    ) -> attention_weights.AttentionMaps:
        """Returns the softmax weights of every block.

        Args:
          part: "decoder", of masked images; or "encoder", of whole ones.

        Raises:
          ConversionError: if there is no decoder, or the encoder attends in windows.
          ValueError: for an unknown part, or `mask_ratio` for the encoder.
        """
        if part not in ("decoder", "encoder"):
            raise ValueError(f"Unknown part {part!r}. Known: decoder, encoder.")
        if part == "decoder":
            needs.decoder(self.card)
            needs.blocks(self.card, self.model.decoder)
            return self._masked(
                "attention", _decoder_attention, images, mask_ratio, seed
            )
        if mask_ratio is not None:
            raise ValueError(
                f"mask_ratio={mask_ratio} with part='encoder': its attention is that "
                "of whole images; leave mask_ratio out."
            )
        needs.whole_attention(self.card)
        return self._run("encoder_attention", self._encoder_attention, images)

    def attention_magnitudes(
        self, images: Any, *, mask_ratio: float | None = None, seed: int = 0,
        numbers: Integer[np.ndarray, "b"] | None = None,
    ) -> attention_weights.Magnitudes:
        """Returns how much masked patches attend to visible and to masked ones.

        Of each image: arrays are [b i]. `decoder_analysis.attention` measures a data
        set.

        Raises:
          ConversionError: if there is no decoder.
          SetupError: if masked patches attend to each other in a layer of its own.
        """
        needs.decoder(self.card)
        needs.blocks(self.card, self.model.decoder)
        needs.one_softmax(self.card, self.model.decoder)

        def magnitudes(objective, variables, images, ids):
            return attention_weights.magnitudes(
                objective.model, variables, images, ids
            )

        measured = self._masked(
            "magnitudes", magnitudes, images, mask_ratio, seed, numbers
        )
        num_visible, num_masked = int(measured.num_visible), int(measured.num_masked)
        return measured._replace(num_visible=num_visible, num_masked=num_masked)

    def targets(self, images: Any) -> Float[np.ndarray, "b n t"]:
        """Returns what should be predicted for every patch: the space of `predict`."""
        needs.target(self.card)
        objective = self._objective(None)
        needs.of_patches(self.card, objective.target, objective.model.encoder)

        def targets(variables, images):
            (target,) = objective.target(variables, self._normalize(images)).values()
            return target.values

        return self._run("targets", targets, images)

    def prepare(self, images: Any) -> UInt8[np.ndarray, "b height width c"]:
        """Returns images as an array of the model's size.

        Raises:
          ValueError: if they are no uint8 images, or an array of another size.
        """
        return transforms.whole_images(
            images, image_size=tuple(self.card.image_size), channels=self.card.channels
        )

    def _run(self, name: Any, function: Callable[..., Any], images: Any, *rest: Any):
        """Calls function(variables, images, ...), compiled once under this name."""
        if name not in self._compiled:
            with_precision = jax.default_matmul_precision("highest")(function)
            self._compiled[name] = jax.jit(parallel.within(self._mesh, with_precision))
        result = self._compiled[name](self.variables, self.prepare(images), *rest)
        return jax.tree.map(np.asarray, result)

    def _normalize(self, images: Array) -> Array:
        return augment.normalize(images, mean=self.card.mean, std=self.card.std)

    def _encoded(self, images: Any) -> dict[str, np.ndarray]:
        return self._run("encode", self._encode, images)

    def _encode(self, variables: Any, images: Array) -> dict[str, Array]:
        images = self._normalize(images)
        if self.card.kind == "classifier":
            classified = self.model.apply(variables, images)._asdict()
            classified["tokens"] = classified["tokens"].sequence
            return {name: x for name, x in classified.items() if x is not None}
        encoded = self._whole(variables, images)
        features = encoded.trained(self.card.fusion.used_maps).mean()
        return {"tokens": encoded.last.sequence, "features": features}

    def _whole(self, variables: Any, images: Array) -> Encoded:
        """Encodes whole images."""
        if self.card.kind == "encoder":
            return self.model.apply(variables, images)
        return self.model.apply(
            variables, images, method=lambda model, images: model.encoder(images)
        )

    def _feature_maps(self, variables: Any, images: Array) -> Array:
        encoded = self._whole(variables, self._normalize(images))
        return jnp.stack([tokens.sequence for tokens in encoded.maps])

    def _encoder_attention(self, variables: Any, images: Array) -> Any:
        with watching.recording() as recorded:
            self._whole(variables, self._normalize(images))
        return attention_weights.of_whole_images(recorded)

    def _objective(self, mask_ratio: float | None) -> pretrain.Pretrain:
        """Returns the objective with this share of patches masked, made once."""
        needs.decoder(self.card)
        if mask_ratio not in self._objectives:
            config = structure.config_of(self.card)
            if mask_ratio is not None:
                config = pretrain.with_mask_ratio(config, float(mask_ratio))
            with errors.setting_up():
                self._objectives[mask_ratio] = pretrain.Pretrain(config)
        return self._objectives[mask_ratio]

    def _masked(
        self, name: Any, function: Callable[..., Any], images: Any,
        mask_ratio: float | None, seed: int, numbers: Any = None, *rest: Any,
    ) -> Any:
        """Calls function(objective, variables, images, ids, ...) on masked images."""
        objective = self._objective(mask_ratio)

        def run(variables, images, seed, numbers, *rest):
            key = jax.random.key(seed, impl="threefry2x32")
            ids = objective.masked_ids(key, {"sample": numbers})
            return function(objective, variables, self._normalize(images), ids, *rest)

        images = self.prepare(images)
        numbers = np.arange(len(images)) if numbers is None else np.asarray(numbers)
        if not 0 <= seed < 2**32 or numbers.shape != images.shape[:1]:
            raise errors.SetupError(
                f"seed={seed}, numbers of shape {numbers.shape}; expected a seed from "
                f"0 to {2**32 - 1}, and a number for each of {len(images)} images."
            )
        seed, numbers = (np.asarray(x, np.uint32) for x in (seed, numbers))
        return self._run((name, mask_ratio), run, images, seed, numbers, *rest)


def _decoder_attention(objective, variables, images, ids):
    return attention_weights.of_decoder(objective.model, variables, images, ids)
