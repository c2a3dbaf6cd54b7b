"""Masked image pre-training: MAE (arXiv 2111.06377), CrossMAE (arXiv 2401.14391) and,
on either of them, PR-MIM (arXiv 2411.15746).

    normalise -> sample tokens -> model -> target -> loss

The loss is the mean squared error over the predicted patches, in float32: those that
were decoded and, where an aggregator predicts them, those that were thrown. Beside it
stands the loss of a trivial predictor, the mean of each patch: about 1.0 for
standardised targets. A model at that level has learnt nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key
from ml_collections import ConfigDict

from crossmae_jax import augment, losses, masking, sampling
from crossmae_jax.models import mim, vit
from crossmae_jax.targets import pixels
from crossmae_jax.tokens import patchify, put_tokens, take_tokens, unpatchify

Variables = dict[str, Any]
Batch = dict[str, Array]


class Reconstruction(NamedTuple):
    """Pictures in 0..1, which patches were masked, and how wrong each was predicted.

    `prediction` is grey where the patch was visible; in `pasted` the visible patches
    are copied from the input. `thrown` are those that an aggregator predicted; without
    one there are none. `error` is the mean squared error of each patch, 0 at visible
    ones.
    """

    image: Float[Array, "b height width c"]
    prediction: Float[Array, "b height width c"]
    pasted: Float[Array, "b height width c"]
    mask: Bool[Array, "b n"]
    thrown: Bool[Array, "b n"]
    error: Float[Array, "b n"]


class Pretrain:
    """Pure functions of one masked-image-modelling configuration.

    Attributes:
      model: the Flax module; give it images and token ids.
      counts: how many patches are seen, decoded and thrown in training.

    Raises:
      ValueError: if the configuration contradicts itself.
    """

    outputs = frozenset({"features", "class_token", "reconstruction"})

    def __init__(self, config: ConfigDict):
        self.config = config
        self.model = mim.build(config)
        self.image_size = tuple(config.data.image_size)
        self.patch_size = self.model.encoder.patch_size
        self.grid = self.model.encoder.grid
        self.num_patches = self.grid[0] * self.grid[1]
        self.sampler = sampling.Sampler(self.grid, **config.masking)
        self.counts = self.sampler.counts
        self._check_throwing()
        # Mean and std are checked against the channels here, not in the first step.
        shape = (1, *self.image_size, config.data.channels)
        jax.eval_shape(
            self.normalize, {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        )

    def _check_throwing(self) -> None:
        if self.model.aggregator is not None and not self.counts.num_thrown:
            raise ValueError(
                f"aggregator.kind={self.config.model.aggregator.kind!r} predicts "
                f"thrown patches, but {self.sampler.throwing}, or set kind='none'."
            )
        if self.config.loss.thrown_weight <= 0:
            raise ValueError(
                f"loss.thrown_weight={self.config.loss.thrown_weight} must be above 0; "
                "to leave thrown patches out, set config.model.aggregator.kind='none'."
            )

    def init(self, key: Key[Array, ""]) -> Variables:
        """Draws the parameters; the shapes do not depend on the batch."""
        images = jnp.zeros((1, *self.image_size, self.config.data.channels))
        blank = {
            "sample": jnp.zeros(1, jnp.uint32),
            "weights": jnp.ones((1, self.sampler.num_units)),
        }
        ids = self.sample(key, blank)
        return self.model.init(key, images, ids)

    def normalize(self, batch: Batch) -> Float[Array, "b height width c"]:
        """Returns the images as the model takes them."""
        data = self.config.data
        return augment.normalize(
            batch["image"], mean=tuple(data.mean), std=tuple(data.std)
        )

    def sample(self, key: Key[Array, ""], batch: Batch) -> masking.TokenIds:
        """Draws each sample's visible, decoded and thrown patches."""
        return self.sampler.draw(key, batch)

    def target(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b n t"]:
        """Returns what should be predicted for every patch."""
        return pixels.pixels(
            images, patch_size=self.patch_size,
            normalize=self.config.target.normalize,
        )

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss of a batch, and what to log beside it."""
        return self.masked_loss(
            variables, self.normalize(batch), self.sample(key, batch)
        )

    def masked_loss(
        self,
        variables: Variables,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss of normalised images under given token ids."""
        return self.prediction_loss(
            self.model.apply(variables, images, ids), images, ids
        )

    def prediction_loss(
        self,
        pred: Float[Array, "b p t"],
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss of predictions for the patches `model.predicted(ids)`."""
        target = take_tokens(self.target(images), self.model.predicted(ids))
        patch_mean = jnp.broadcast_to(target.mean(-1, keepdims=True), target.shape)
        num_pred, weights = ids.pred.shape[1], None
        if self.model.aggregator is not None:
            thrown_weight = self.config.loss.thrown_weight
            weights = jnp.ones(target.shape[1]).at[num_pred:].set(thrown_weight)
        logged = {"loss_trivial": losses.mse(patch_mean, target, weights).mean()}
        if self.model.aggregator is None:
            return losses.mse(pred, target).mean(), logged
        for name, part in (
            ("retained", slice(None, num_pred)), ("thrown", slice(num_pred, None))
        ):
            error = losses.mse(pred[:, part], target[:, part])
            logged[f"loss_{name}"] = error.mean()
        return losses.mse(pred, target, weights).mean(), logged

    def predict(
        self, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "b d"]]:
        """Returns features of whole images: all patches visible, no key, no masking.

        "features" is the mean over patch tokens of the encoder's output, or of the last
        feature map that the decoder uses: blocks behind it are not trained.
        "class_token" is the class token of the same output or map.
        """
        images = self.normalize(batch)
        encoded = self.model.apply(variables, images, method="encode")
        used_maps = self.model.fusion.used_maps
        return {
            "features": vit.mean_feature(encoded, used_maps),
            "class_token": vit.class_token(encoded, used_maps),
        }

    def masked_ids(self, key: Key[Array, ""], batch: Batch) -> masking.TokenIds:
        """Draws ids for a reconstruction: every masked patch, however few in training.

        All are decoded; with an aggregator as many as in training, and the others are
        thrown.
        """
        return self.sampler.draw_all(
            key, batch, throw=self.model.aggregator is not None
        )

    def reconstruct(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> Reconstruction:
        """Predicts every masked patch, those of `masked_ids`."""
        images = self.normalize(batch)
        ids = self.masked_ids(key, batch)
        return self.pictures(self.model.apply(variables, images, ids), images, ids)

    def pictures(
        self,
        pred: Float[Array, "b p t"],
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds,
    ) -> Reconstruction:
        """Returns predictions for the patches `model.predicted(ids)` as pictures.

        With standardised targets a prediction is turned back into pixels with the mean
        and standard deviation of the TRUE patch: colours and contrast then come from
        the image, not from the model.
        """
        pred = pred.astype(jnp.float32)
        predicted = self.model.predicted(ids)
        values = patchify(images, patch_size=self.patch_size)
        target = take_tokens(self.target(images), predicted)
        pictures = pixels.to_pixels(
            pred, take_tokens(values, predicted),
            normalize=self.config.target.normalize,
        )
        error = jnp.mean((pred - target) ** 2, axis=-1, keepdims=True)
        mean_patch = jnp.zeros_like(values)  # grey: the mean of the normalised images
        return Reconstruction(
            image=self._picture(values),
            prediction=self._picture(
                put_tokens(mean_patch, predicted, pictures)
            ),
            pasted=self._picture(put_tokens(values, predicted, pictures)),
            mask=masking.mask_of(predicted, num_patches=self.num_patches),
            thrown=masking.mask_of(ids.thrown, num_patches=self.num_patches),
            error=put_tokens(
                jnp.zeros((*error.shape[:1], self.num_patches, 1)), predicted, error
            )[:, :, 0],
        )

    def _picture(self, vectors):
        """Returns patch vectors of normalised images as images in 0..1."""
        image = unpatchify(vectors, grid=self.grid, patch_size=self.patch_size)
        data = self.config.data
        return augment.unnormalize(image, mean=tuple(data.mean), std=tuple(data.std))
