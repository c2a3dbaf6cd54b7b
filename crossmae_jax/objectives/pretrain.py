"""Masked image pre-training: MAE (arXiv 2111.06377) and CrossMAE (arXiv 2401.14391).

    normalise -> sample tokens -> model -> target -> loss

The loss is the mean squared error over the predicted patches, in float32. Beside it
stands the loss of a trivial predictor, the mean of each patch: about 1.0 for
standardised targets. A model at that level has learnt nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key
from ml_collections import ConfigDict

from crossmae_jax import augment, losses, masking, patches, targets
from crossmae_jax.models import mim, vit

Variables = dict[str, Any]
Batch = dict[str, Array]


class Reconstruction(NamedTuple):
    """Pictures in 0..1, where they were masked, and the loss on the masked patches.

    `prediction` is grey where the patch was visible; in `pasted` the visible patches
    are copied from the input.
    """

    image: Float[Array, "b height width c"]
    prediction: Float[Array, "b height width c"]
    pasted: Float[Array, "b height width c"]
    mask: Bool[Array, "b n"]
    mse: Float[Array, "b"]


class Pretrain:
    """Pure functions of one masked-image-modelling configuration.

    Attributes:
      model: the Flax module; give it images and token ids.
      counts: how many patches are seen and predicted in training.

    Raises:
      ValueError: if the configuration contradicts itself.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.model = mim.build(config)
        self.image_size = tuple(config.data.image_size)
        _, self.patch_size = vit.parse_size(config.model.size)
        self.grid = patches.grid_size(self.image_size, self.patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.counts = masking.token_counts(
            self.num_patches,
            mask_ratio=config.masking.mask_ratio,
            pred_ratio=config.masking.pred_ratio,
        )
        # Mean and std are checked against the channels here, not in the first step.
        shape = (1, *self.image_size, config.data.channels)
        jax.eval_shape(
            self.normalize, {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        )

    def init(self, key: Key[Array, ""]) -> Variables:
        """Draws the parameters; the shapes do not depend on the batch."""
        images = jnp.zeros((1, *self.image_size, self.config.data.channels))
        ids = self.sample(key, jnp.zeros(1, jnp.uint32))
        return self.model.init(key, images, ids)

    def normalize(self, batch: Batch) -> Float[Array, "b height width c"]:
        """Returns the images as the model takes them."""
        data = self.config.data
        return augment.normalize(
            batch["image"], mean=tuple(data.mean), std=tuple(data.std)
        )

    def sample(self, key: Key[Array, ""], sample: Array) -> masking.TokenIds:
        """Draws each sample's visible and predicted patches from its number."""
        return masking.sample_token_ids(
            key, sample, num_patches=self.num_patches, **self.counts._asdict()
        )

    def target(
        self, images: Float[Array, "b height width c"]
    ) -> Float[Array, "b n t"]:
        """Returns what should be predicted for every patch."""
        return targets.pixels(
            images, patch_size=self.patch_size,
            normalize=self.config.target.normalize,
        )

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss of a batch, and what to log beside it."""
        return self.masked_loss(
            variables, self.normalize(batch), self.sample(key, batch["sample"])
        )

    def masked_loss(
        self,
        variables: Variables,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the loss of normalised images under given token ids."""
        pred = self.model.apply(variables, images, ids)  # b q t
        target = patches.take_tokens(self.target(images), ids.pred)
        patch_mean = jnp.broadcast_to(target.mean(-1, keepdims=True), target.shape)
        trivial = losses.mse(patch_mean, target)
        return losses.mse(pred, target).mean(), {"loss_trivial": trivial.mean()}

    def predict(
        self, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "b d"]]:
        """Returns features of whole images: all patches visible, no key, no masking.

        "features" is the mean over patch tokens of the encoder's output, or of the last
        feature map that the decoder uses: blocks behind it are not trained.
        """
        images = self.normalize(batch)
        encoded = self.model.apply(variables, images, method="encode")
        tokens = encoded.tokens
        if self.model.fusion is not None:
            tokens = encoded.feature_maps[self.model.fusion.maps[-1]]
        return {"features": tokens[:, 1:].astype(jnp.float32).mean(1)}

    def reconstruct(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> Reconstruction:
        """Decodes every masked patch, however few are decoded in training.

        With standardised targets a prediction is turned back into pixels with the mean
        and standard deviation of the TRUE patch: colours and contrast then come from
        the image, not from the model. `mse` is the loss over all masked patches.
        """
        images = self.normalize(batch)
        num_keep = self.counts.num_keep
        ids = masking.sample_token_ids(
            key, batch["sample"], num_patches=self.num_patches, num_keep=num_keep,
            num_pred=self.num_patches - num_keep,
        )
        pred = self.model.apply(variables, images, ids).astype(jnp.float32)
        values = patches.patchify(images, patch_size=self.patch_size)
        target = patches.take_tokens(self.target(images), ids.pred)
        pixels = targets.to_pixels(
            pred, patches.take_tokens(values, ids.pred),
            normalize=self.config.target.normalize,
        )
        data = self.config.data
        mean_patch = jnp.zeros_like(values)  # grey: the mean of the normalised images

        def picture(vectors):
            image = patches.unpatchify(
                vectors, grid=self.grid, patch_size=self.patch_size
            )
            return augment.unnormalize(
                image, mean=tuple(data.mean), std=tuple(data.std)
            )

        return Reconstruction(
            image=picture(values),
            prediction=picture(patches.put_tokens(mean_patch, ids.pred, pixels)),
            pasted=picture(patches.put_tokens(values, ids.pred, pixels)),
            mask=masking.pred_mask(ids),
            mse=losses.mse(pred, target),
        )
