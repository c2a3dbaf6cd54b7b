"""How far the gradients of one objective lie from those of another."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

ANOTHER_MASK = "another mask"


class GradientDeviation(NamedTuple):
    """How far gradients lie from reference gradients, a value per batch.

    Attributes:
      distance: |g - g0| / |g0|, with the Euclidean norm over all parameters.
      angle: 1 - cosine of the angle between g and g0.
    """

    distance: Float[np.ndarray, "n"]
    angle: Float[np.ndarray, "n"]


def deviation(
    reference: Any,
    variants: Mapping[Hashable, Any],
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    key: Key[Array, ""],
) -> dict[Hashable, GradientDeviation]:
    """Compares the encoder's gradients of other objectives with a reference's.

    PR-MIM (arXiv 2411.15746, figure 4) reports that gradients of plain throwing stray
    from those of MAE, the more the more is thrown, and that progressive reconstruction
    brings them back. The paper does not define its measure; this is ours: the same
    weights, images and visible patches, the gradients g0 of the reference's loss and g
    of the variant's, over the parameters of the encoder.

    Beside the variants stands `ANOTHER_MASK`: the reference itself with other visible
    patches, which says how much of a distance is the noise of masking.

    Let the objectives compute in float32: bfloat16 is as coarse as small deviations.

    Args:
      reference: objective, such as MAE; needs `counts` and `loss`.
      variants: objectives by name, with the reference's encoder and mask ratio.
      variables: weights for all of them; parameters that one does not have, such as an
        aggregator's, are ignored there.
      batches: batches as the objectives take them, "image" and "sample".
      key: draws the masks.

    Returns:
      A value per batch for each variant and for `ANOTHER_MASK`.

    Raises:
      ValueError: if a variant sees other patches than the reference does.
    """
    mask_key, other_key = jax.random.split(key)
    for name, variant in variants.items():
        if variant.counts.num_keep != reference.counts.num_keep:
            raise ValueError(
                f"Variant {name!r} sees {variant.counts.num_keep} patches, the "
                f"reference {reference.counts.num_keep}; give both one mask_ratio."
            )
    gradients = {name: _encoder_gradient(variant) for name, variant in variants.items()}
    gradient = _encoder_gradient(reference)
    deviations = {name: [] for name in (*variants, ANOTHER_MASK)}
    for batch in batches:
        expected = gradient(variables, batch, mask_key)
        for name, other in gradients.items():
            deviations[name].append(
                _deviation(other(variables, batch, mask_key), expected)
            )
        deviations[ANOTHER_MASK].append(
            _deviation(gradient(variables, batch, other_key), expected)
        )
    return {
        name: GradientDeviation(*np.asarray(values, np.float64).T)
        for name, values in deviations.items()
    }


def _encoder_gradient(objective: Any) -> Callable[..., Any]:
    @jax.jit
    @jax.default_matmul_precision("highest")
    def gradient(variables, batch, key):
        params = variables["params"]

        def loss(encoder):
            changed = {**variables, "params": {**params, "encoder": encoder}}
            return objective.loss(changed, batch, key)[0]

        return jax.grad(loss)(params["encoder"])

    return gradient


@jax.jit
def _deviation(gradient: Any, expected: Any) -> tuple[Array, Array]:
    def dot(a, b):
        products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
        return sum(jax.tree.leaves(products))  # no matrix product: float32 everywhere

    difference = jax.tree.map(jnp.subtract, gradient, expected)
    norm, expected_norm = (jnp.sqrt(dot(g, g)) for g in (gradient, expected))
    distance = jnp.sqrt(dot(difference, difference)) / expected_norm
    return distance, 1 - dot(gradient, expected) / (norm * expected_norm)
