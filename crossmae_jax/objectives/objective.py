"""What the train loop, the evaluations and the tools ask of an objective."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import linen as nn
from jaxtyping import Array, Float, Key

from crossmae_jax.origins import Origin

Variables = dict[str, Any]
Batch = Mapping[str, Array]


class Aux(NamedTuple):
    """What a loss gives beside its value; averaged over micro-batches.

    Attributes:
      metrics: scalars to log.
      collections: what replaces collections of the variables, such as the statistics
        of a batch norm.
    """

    metrics: dict[str, Float[Array, ""]]
    collections: Variables = {}


@dataclasses.dataclass(frozen=True)
class Output:
    """Something that a model gives of a batch: `output(variables, batch)`.

    Attributes:
      function: of variables and batch, and of a key if `draws`.
      field: which of the function's results this is; all of them if not given. Outputs
        of one function are computed together, see `Outputs`.
      draws: whether something is drawn, such as a mask.
      rows: whether it is a row per image, f32[b d], which evaluators can have of whole
        splits.
      caption: what a viewer of it must know.
    """

    function: Callable[..., Any]
    field: str | None = None
    draws: bool = False
    rows: bool = False
    caption: str = ""

    def __call__(
        self, variables: Variables, batch: Batch, key: Key[Array, ""] | None = None
    ) -> Any:
        """Computes the output; the key is for those that draw."""
        return self.of(self.run(variables, batch, key))

    def run(
        self, variables: Variables, batch: Batch, key: Key[Array, ""] | None
    ) -> Any:
        """Computes all results of the function."""
        if self.draws:
            return self.function(variables, batch, key)
        return self.function(variables, batch)

    def of(self, results: Any) -> Any:
        """Returns this output of the function's results."""
        return results if self.field is None else results[self.field]


class Outputs(dict[str, Output]):
    """What a model gives, by name."""

    def together(self, names: Iterable[str]) -> Callable[..., dict[str, Any]]:
        """Returns a function of variables, batch and key that gives these by name.

        What comes from one function is computed once; only what draws needs the key.

        Raises:
          ValueError: if there is no such output.
        """
        chosen = {name: self.get(name) for name in names}
        if missing := [name for name, output in chosen.items() if output is None]:
            raise ValueError(
                f"No output {', '.join(missing)}; the model has "
                f"{', '.join(sorted(self))}. Ask for one of these."
            )

        def compute(variables, batch, key=None):
            results = {}
            for output in chosen.values():
                if output.function not in results:
                    results[output.function] = output.run(variables, batch, key)
            return {
                name: output.of(results[output.function])
                for name, output in chosen.items()
            }

        return compute


def kept(variables: Variables, starts: Iterable[str]) -> Variables:
    """Returns the variables without collections that only training needs.

    Args:
      starts: of an `Objective`.
    """
    return {
        name: tree for name, tree in variables.items()
        if name == "params" or name not in starts
    }


@runtime_checkable
class Objective(Protocol):
    """What a batch is trained on: pure functions of one configuration.

    Attributes:
      model: the Flax module.
      starts: by collection of variables, the weights that it begins with, of any
        format; "" for none. A collection that is not named begins as drawn, or with
        the weights of "params". One that is, other than "params", is needed to train
        and for nothing else.
      outputs: what the trained model gives, by name; evaluators ask for any of them. Of
        whole images "features" and "class_token", f32[b d], and of a classifier
        "logits", f32[b classes]; of masked ones, where the target can be looked at,
        "reconstruction", with pictures, masks and errors.
    """

    model: nn.Module
    starts: Mapping[str, str | Origin]
    outputs: Outputs

    def init(self, key: Key[Array, ""]) -> Variables:
        """Draws the variables, by collection; optimisers see "params" alone."""

    def loss(
        self, variables: Variables, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the mean loss of a batch, and what comes with it."""
