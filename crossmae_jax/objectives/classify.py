"""Classification: full and partial fine-tuning, and linear probing, of an encoder.

    normalise -> erase -> mix -> encoder -> pool -> head -> cross-entropy

as in MAE (arXiv 2111.06377, appendix A.1 and section 4.3). What differs between them is
in the configuration alone: `tune_blocks` says how much is trained, `model.pool`
and `model.head_norm` what the head sees, `augment` how images are erased and mixed.

Whatever is drawn follows from the key and the numbers of the samples, so a run that
goes on from a checkpoint draws what it would have drawn.
"""


import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from crossmae_jax import augment, losses
from crossmae_jax.models import classifier
from crossmae_jax.objectives.objective import Aux, Batch, Output, Outputs, Variables
from crossmae_jax.optim import layerwise


class Classify:
    """Pure functions of one classifier's configuration; see `objective.Objective`.

    Raises:
      ValueError: if the configuration contradicts itself.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        self.num_classes = config.data.num_classes
        if not self.num_classes:
            raise ValueError(
                f"data.num_classes={self.num_classes}, and no data is "
                "there to say it; set config.data.num_classes, such as 1000."
            )
        _check(config)
        self.model = classifier.build(config)
        # Mean and std are checked here, not in the first step.
        shape = (1, *config.data.image_size, config.data.channels)
        jax.eval_shape(
            self.normalize, {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        )

    def init(self, key: Key[Array, ""]) -> Variables:
        """Draws the parameters; the shapes do not depend on the batch."""
        data = self.config.data
        images = jnp.zeros((1, *data.image_size, data.channels))
        return self.model.init(key, images)

    def normalize(self, batch: Batch) -> Float[Array, "b height width c"]:
        """Returns the images as the model takes them."""
        data = self.config.data
        return augment.normalize(
            batch["image"], mean=tuple(data.mean), std=tuple(data.std)
        )

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of a batch, and the share of images that it hits.

        Where the head has a batch norm, the collection "batch_stats" is replaced by
        its new statistics.
        """
        images, targets = self.augmented(batch, key)
        first = batch["sample"][0]
        drop_key = jax.random.fold_in(jax.random.fold_in(key, 2), first)
        params = layerwise.stop_frozen(
            variables["params"], tune_blocks=self.config.tune_blocks,
            depth=self.model.encoder.depth,
        )
        outputs, updated = self.model.apply(
            {**variables, "params": params}, images, train=True,
            mutable=["batch_stats"], rngs={"drop_path": drop_key},
        )
        loss = losses.cross_entropy(outputs.logits, targets).mean()
        hit = outputs.logits.argmax(-1) == targets.argmax(-1)
        return loss, Aux({"top1": hit.astype(jnp.float32).mean()}, dict(updated))

    def augmented(
        self, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, "b height width c"], Float[Array, "b classes"]]:
        """Returns images and targets as they are trained on, erased and mixed."""
        options, images = self.config.augment, self.normalize(batch)
        targets = losses.smooth_labels(
            batch["label"], num_classes=self.num_classes,
            smoothing=options.label_smoothing,
        )
        if options.erasing:
            images = augment.random_erasing(
                jax.random.fold_in(key, 0), batch["sample"], images,
                probability=options.erasing,
            )
        if options.mixup or options.cutmix:
            images, targets = augment.mixup_cutmix(
                jax.random.fold_in(key, 1), batch["sample"], images, targets,
                groups=max(1, images.shape[0] // options.mixed_together),
                mixup_alpha=options.mixup or 1.0, cutmix_alpha=options.cutmix or 1.0,
                cutmix_probability=_cutmix_probability(options),
            )
        return images, targets

    @property
    def starts(self) -> dict[str, str]:
        """The encoder, and what else fits, of `config.init_from`."""
        return {"params": self.config.init_from}

    @property
    def outputs(self) -> Outputs:
        """What the classifier gives of whole images."""
        names = ["features", "logits"]
        if self.model.encoder.has_cls:
            names.append("class_token")
        return Outputs({
            name: Output(self._classified, name, rows=True) for name in names
        })

    def _classified(
        self, variables: Variables, batch: Batch
    ) -> dict[str, Float[Array, "b d"]]:
        """Returns the pooled features of whole images, and their logits.

        "class_token" is that of the encoder's output: with pool "cls" the features
        themselves, with "mean" not normed, since only their mean is.
        """
        found = self.model.apply(variables, self.normalize(batch))
        outputs = {"features": found.features, "logits": found.logits}
        if found.tokens.has_cls:
            outputs["class_token"] = found.tokens.cls[:, 0]
        return {name: x.astype(jnp.float32) for name, x in outputs.items()}


def _cutmix_probability(options: ConfigDict) -> float:
    if options.mixup and options.cutmix:
        return 0.5
    return 1.0 if options.cutmix else 0.0


def _check(config: ConfigDict) -> None:
    options = config.augment
    for name in ("label_smoothing", "erasing"):
        if not 0 <= options[name] <= 1:
            raise ValueError(
                f"augment.{name}={options[name]} must lie between 0 and 1."
            )
    for name in ("mixup", "cutmix"):
        if not options[name] >= 0:
            raise ValueError(
                f"augment.{name}={options[name]} is a parameter of a beta "
                "distribution, above 0; 0 turns it off."
            )
    if not (options.mixup or options.cutmix):
        return
    batch = config.data.batch_size // max(config.optim.accum_steps, 1)
    together = min(options.mixed_together, batch)
    if together < 2 or together % 2 or batch % together:
        raise ValueError(
            f"Mixup and cutmix pair the images of a group, but augment.mixed_together="
            f"{options.mixed_together} and {batch} images a step (batch_size="
            f"{config.data.batch_size}, accum_steps={config.optim.accum_steps}) do not "
            "make equal groups of an even number; set config.data.batch_size to a "
            f"multiple of {max(2, options.mixed_together)} times accum_steps, or "
            "config.augment.mixup=0.0 and config.augment.cutmix=0.0."
        )
