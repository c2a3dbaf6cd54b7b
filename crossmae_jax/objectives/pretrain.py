"""Masked image pre-training: MAE (arXiv 2111.06377), CrossMAE (arXiv 2401.14391),
SimMIM (arXiv 2111.09886), LocalMIM (arXiv 2303.05251), TEC (arXiv 2210.11016) and, on
any of them, PR-MIM (arXiv 2411.15746).

    normalise -> sample tokens -> model -> target -> loss

The loss, `config.loss`, is the mean over the predicted patches, in float32: those that
were decoded and, where an aggregator predicts them, those that were thrown. Cells of
another grid count by the share of them that is masked, and several targets add up.
Beside it stands the loss of a trivial predictor, the mean of each patch: about 1.0 for
squared errors of standardised targets, where a model at that level has learnt nothing.
"""

import math
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key
from ml_collections import ConfigDict

from crossmae_jax import augment, losses, masking, ranges, sampling, targets
from crossmae_jax.models import mim, watching
from crossmae_jax.objectives.objective import Aux, Batch, Output, Outputs, Variables
from crossmae_jax.origins import Origin
from crossmae_jax.tokens import Tokens, spread

_DROP_PATH = 2**32 - 1  # folded into a key, where samples have their numbers


class Reconstruction(NamedTuple):
    """Pictures in 0..1, which patches were masked, and how wrong each was predicted.

    `prediction` is grey where the patch was visible; in `pasted` the visible patches
    are copied from the input. `thrown` are those that an aggregator predicted; without
    one there are none. `error` is the mean squared error of each patch, 0 at visible
    ones; where cells are predicted, of those that a patch holds or lies in.

    `target` is what a perfect prediction would look like, None where that is `image`.
    Where it is not, predictions are drawings like it, of a size of their own, and black
    where the patch was visible.
    """

    image: Float[Array, "b height width c"]
    prediction: Float[Array, "b height width c"]
    pasted: Float[Array, "b height width c"]
    mask: Bool[Array, "b n"]
    thrown: Bool[Array, "b n"]
    error: Float[Array, "b n"]
    target: Float[Array, "b height2 width2 c2"] | None = None


class Pretrain:
    """Pure functions of one masked image model's configuration.

    As `objective.Objective`, and for whoever looks at masks and predictions:

    Attributes:
      target: what is to be predicted.
      sampler: draws the masks.
      counts: how many patches are seen, decoded and thrown in training.
      grid: rows and columns of patches.

    Raises:
      ValueError: if the configuration contradicts itself.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.model = mim.build(config)
        self.image_size = tuple(config.data.image_size)
        self.patch_size = self.model.encoder.patch_size
        self.grid = self.model.encoder.grid
        self.target = targets.make(config, patch_size=self.patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.sampler = sampling.make(config.masking, grid=self.grid)
        self.counts = self.sampler.counts
        self._check_loss()
        # Mean and std are checked against the channels here, not in the first step.
        shape = (1, *self.image_size, config.data.channels)
        jax.eval_shape(
            self.normalize, {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        )

    def _check_loss(self) -> None:
        options, names = self.config.loss, self.target.widths
        kinds = options.kind
        kinds = dict.fromkeys(names, kinds) if isinstance(kinds, str) else kinds
        for title, given in (("kind", kinds), ("weights", options.weights)):
            if unknown := sorted(given.keys() - names.keys()):
                raise ValueError(
                    f"loss.{title} names {', '.join(unknown)}, but "
                    f"target.kind={self.config.target.kind!r} has only "
                    f"{', '.join(sorted(names))}; name these."
                )
        for name in names:
            if kinds.get(name) not in losses.LOSSES:
                raise ValueError(
                    f"Unknown loss.kind {kinds.get(name)!r} of {name}. Known: "
                    f"{', '.join(sorted(losses.LOSSES))}."
                )
        if self.model.aggregators and not self.counts.num_thrown:
            raise ValueError(
                f"aggregator.kind={self.config.model.aggregator.kind!r} predicts "
                f"thrown patches, but {self.sampler.throwing}, or set kind='none'."
            )
        for name, weight in options.weights.items():
            ranges.check(f"loss.weights.{name}", weight, least=0)
        if options.thrown_weight <= 0:
            raise ValueError(
                f"loss.thrown_weight={options.thrown_weight} must be above 0; "
                "to leave thrown patches out, set config.model.aggregator.kind='none'."
            )

    def init(self, key: Key[Array, ""]) -> Variables:
        """Draws the parameters; the shapes do not depend on the batch."""
        images = jnp.zeros((1, *self.image_size, self.config.data.channels))
        variables = self.model.init(key, images, self.sampler.some())
        return variables | self.target.init(key)

    def normalize(self, batch: Batch) -> Float[Array, "b height width c"]:
        """Returns the images as the model takes them."""
        data = self.config.data
        return augment.normalize(
            batch["image"], mean=tuple(data.mean), std=tuple(data.std)
        )

    def sample(self, key: Key[Array, ""], batch: Batch) -> masking.TokenIds:
        """Draws each sample's visible, decoded and thrown patches."""
        return self.sampler.draw(key, batch)

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of a batch, and what to log beside it."""
        rngs = None
        if self.model.encoder.drop_path:
            drop_key = jax.random.fold_in(key, _DROP_PATH)
            first = batch["sample"][0]
            rngs = {"drop_path": jax.random.fold_in(drop_key, first)}
        return self.masked_loss(
            variables, self.normalize(batch), self.sample(key, batch), rngs
        )

    def masked_loss(
        self,
        variables: Variables,
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds,
        rngs: dict[str, Key[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of normalised images under given token ids.

        Args:
          rngs: keys of what else is drawn: "drop_path" of blocks that are left out,
            none of which is without it.
        """
        target = jax.lax.stop_gradient(self.target(variables, images))
        asked = {
            name: tokens.ids for name, tokens in target.items()
            if tokens.ids is not None
        }
        predicted = self.model.apply(variables, images, ids, asked, rngs=rngs)
        return self.prediction_loss(predicted, target, ids)

    def prediction_loss(
        self,
        predicted: dict[str, Tokens],
        target: dict[str, Tokens],
        ids: masking.TokenIds,
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of predictions of some targets, and its parts.

        "loss_trivial" is that of the mean of each place. With an aggregator
        "loss_retained" and "loss_thrown" are the means over patches that were decoded
        and that were thrown. Of several targets all of these are weighted sums, and
        "loss_NAME" is one target's, not weighted.
        """
        logged: dict[str, Array] = {}
        for name, pred in predicted.items():
            weight = self.config.loss.weights.get(name, 1.0)
            terms = self.term(name, pred, target[name], ids)
            for part, value in terms.items():
                logged[part] = logged.get(part, 0.0) + weight * value
            if len(predicted) > 1:
                logged[f"loss_{name}"] = terms["loss"]
        return logged.pop("loss"), Aux(logged)

    def term(
        self, name: str, pred: Tokens, target: Tokens, ids: masking.TokenIds
    ) -> dict[str, Float[Array, ""]]:
        """Returns the loss of one target, that of the trivial predictor, and its parts.

        Predictions come where the target has ids, in their order; or else at the masked
        patches, retained before thrown ones; or at all cells of a grid.
        """
        kind = self.config.loss.kind
        measure = losses.LOSSES[kind if isinstance(kind, str) else kind[name]]
        wanted = target.at(pred.ids) if target.ids is None else target.values
        groups = self.target.groups.get(name, 1)

        def measured(values):
            parts = (
                einops.rearrange(x, "b q (g t) -> b q g t", g=groups)
                for x in (values, wanted)
            )
            return einops.rearrange(measure(*parts), "b q g v -> b q (g v)")

        trivial = jnp.broadcast_to(wanted.mean(-1, keepdims=True), wanted.shape)
        error = measured(pred.values)
        weights, parts = None, {}
        if target.ids is None:
            weights, parts = self._counted(pred, ids)
        terms = {
            "loss": losses.mean(error, weights).mean(),
            "loss_trivial": losses.mean(measured(trivial), weights).mean(),
        }
        for part, (places, its_weights) in parts.items():
            terms[part] = losses.mean(error[:, places], its_weights).mean()
        return terms

    def _counted(self, pred, ids):
        """Returns the weights of predicted places, and by part which ones and weights.

        Weights are [b q] or [1 q]; None counts all alike.
        """
        aggregates = bool(self.model.aggregators)
        thrown_weight = self.config.loss.thrown_weight
        if pred.ids is not None and pred.grid == self.grid:
            if not aggregates:
                return None, {}
            num_pred = ids.pred.shape[1]
            weights = jnp.ones(pred.ids.shape[1]).at[num_pred:].set(thrown_weight)
            return weights[None], {
                "loss_retained": (slice(None, num_pred), None),
                "loss_thrown": (slice(num_pred, None), None),
            }
        masked, thrown = (
            Tokens(
                masking.coverage(part, grid=self.grid, of=pred.grid)[:, :, None], None,
                pred.grid,
            ).at(pred.ids)[:, :, 0]
            for part in (ids.pred, ids.thrown)
        )
        if not aggregates:
            return masked, {}
        return masked + thrown_weight * thrown, {
            "loss_retained": (slice(None), masked),
            "loss_thrown": (slice(None), thrown),
        }

    @property
    def starts(self) -> dict[str, str | Origin]:
        """What fits of `config.init_from`, and what a target begins with."""
        return {"params": self.config.init_from, **self.target.starts}

    @property
    def outputs(self) -> Outputs:
        """Features of whole images, with a class token its attention and, of a target
        that has any, a picture of masked ones.
        """
        outputs = Outputs(features=Output(self._features, "features", rows=True))
        if self.model.encoder.has_cls:
            outputs["class_token"] = Output(self._features, "class_token", rows=True)
            outputs["attention_map"] = Output(self._attention_map)
        if self.target.caption is not None:
            outputs["reconstruction"] = Output(
                self._reconstruct, draws=True, caption=self.target.caption
            )
        return outputs

    def _features(
        self, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "b d"]]:
        """Returns features of whole images: all patches visible, no key, no masking.

        "features" is the mean over patch tokens of the encoder's output, or of the last
        feature map that the decoder uses: blocks behind it are not trained.
        "class_token" is the class token of the same output or map, where there is one.
        """
        images = self.normalize(batch)
        encoded = self.model.apply(variables, images, method="encode")
        trained = encoded.trained(self.model.fusion.used_maps)
        features = {"features": trained.mean()}
        if trained.has_cls:
            features["class_token"] = trained.cls[:, 0].astype(jnp.float32)
        return features

    def _attention_map(
        self, variables: Variables, batch: Batch
    ) -> Float[Array, "b row col"]:
        """Returns where the encoder looks, see `watching.attention_map`."""
        of_encoder = {
            name: tree["encoder"] for name, tree in variables.items()
            if "encoder" in tree
        }
        found = watching.attention_map(
            self.model.encoder, of_encoder, self.normalize(batch)
        )
        return found.reshape(-1, *self.grid)

    def masked_ids(self, key: Key[Array, ""], batch: Batch) -> masking.TokenIds:
        """Draws ids for a reconstruction: every masked patch, however few in training.

        All are decoded; with an aggregator as many as in training, and the others are
        thrown.
        """
        return self.sampler.draw_all(key, batch, throw=bool(self.model.aggregators))

    def _reconstruct(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> Reconstruction:
        """Predicts every masked patch, those of `masked_ids`."""
        images = self.normalize(batch)
        ids = self.masked_ids(key, batch)
        predicted = self.model.apply(variables, images, ids)
        return self.pictures(predicted, self.target(variables, images), images, ids)

    def pictures(
        self,
        predicted: dict[str, Tokens],
        target: dict[str, Tokens],
        images: Float[Array, "b height width c"],
        ids: masking.TokenIds,
    ) -> Reconstruction:
        """Returns predictions as pictures."""
        shown = self.target.pixels(predicted, images)
        pred = predicted[shown.name]
        places, grid = pred.ids, pred.grid
        if places is None:  # all cells, those of visible patches among them
            places = jnp.concatenate([ids.pred, ids.thrown], axis=1)
            grid = self.grid
        mask = masking.coverage(places, grid=grid, of=self.grid) > 0
        error = pred.values.astype(jnp.float32) - target[shown.name].at(pred.ids)
        error = pred.with_values(jnp.mean(error**2, axis=-1, keepdims=True)).laid_out()
        error = spread(error[..., 0], of=self.grid).reshape(mask.shape)

        drawn, truth = self._laid_out(shown), images
        if not shown.of_image:
            truth = self._laid_out(self.target.pixels(target, images))
        hidden = spread(mask.reshape(-1, *self.grid), of=drawn.shape[1:3])
        hidden = hidden[..., None]
        # Grey where images are drawn: 0 is the mean of the normalised ones.
        pictures = jnp.where(hidden, drawn, 0), jnp.where(hidden, drawn, truth)
        if shown.of_image:
            pictures = map(self._unnormalized, pictures)
        prediction, pasted = pictures
        thrown = masking.coverage(ids.thrown, grid=self.grid, of=self.grid)
        return Reconstruction(
            image=self._unnormalized(images), prediction=prediction, pasted=pasted,
            mask=mask, thrown=thrown > 0, error=jnp.where(mask, error, 0),
            target=None if shown.of_image else truth,
        )

    def _laid_out(self, shown):
        channels = self.config.data.channels if shown.of_image else 1
        vectors = shown.pictures.laid_out()
        side = math.isqrt(vectors.shape[-1] // channels)
        return einops.rearrange(
            vectors, "b row col (p q c) -> b (row p) (col q) c", p=side, q=side
        )

    def _unnormalized(self, images):
        """Returns normalised images as images in 0..1."""
        data = self.config.data
        return augment.unnormalize(images, mean=tuple(data.mean), std=tuple(data.std))


def with_mask_ratio(config: ConfigDict, mask_ratio: float) -> ConfigDict:
    """Returns settings with another share of patches masked.

    What is predicted and what is thrown keep their shares of it, as far as they fit.
    """
    config = config.copy_and_resolve_references()
    scale = mask_ratio / config.masking.mask_ratio
    config.masking.mask_ratio = mask_ratio
    for name in ("pred_ratio", "throw_ratio"):
        config.masking[name] = min(config.masking[name] * scale, mask_ratio)
    return config
