"""The matrix products and convolutions of a traced program, one after the other.

A program is read as JAX traces it (a jaxpr), before any compiler: what it says is what
the code says, whatever the hardware. Each product stands there with the module of the
model in which it is computed, so that its cost can be given to a part of the model.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.extend import core

_MODULE = re.compile(r"module<([^<>]*)>")


class Product(NamedTuple):
    """One matrix product or convolution, as often as the program computes it.

    Attributes:
      module: path of the innermost Flax module around it, `("encoder", "blocks_0",
        "mlp", "fc1")`; empty outside of all modules.
      macs: multiply-adds.
      differentiated: whether it depends on what is trained, so that a gradient passes
        through it.
    """

    module: tuple[str, ...]
    macs: int
    differentiated: bool


def trace(function: Callable[..., Any], trained: Any, *others: Any) -> list[Product]:
    """Returns the products of `function(trained, *others)`, forward only.

    A program that depends on the platform is read in its general branch: a CPU's or a
    TPU's does the same by other means. Of other branches the costliest counts. A kernel
    counts for every step of its grid.

    Args:
      trained: a tree of arrays or of their shapes; likewise each of `others`.

    Raises:
      NotImplementedError: if there are products in a loop without a fixed length.
    """
    with nn.intercept_methods(_in_scope):
        traced = jax.make_jaxpr(function)(trained, *others).jaxpr
    num_trained = len(jax.tree.leaves(trained))
    num_others = len(traced.invars) - num_trained
    products, _ = _products(traced, [True] * num_trained + [False] * num_others, "")
    return products


def _in_scope(method, args, kwargs, context):
    """Runs a module's method in a scope that carries the module's path."""
    if context.module.scope is None:  # called outside of `apply`: it has no path
        return method(*args, **kwargs)
    with jax.named_scope(f"module<{'/'.join(context.module.path)}>"):
        return method(*args, **kwargs)


def _products(
    jaxpr: core.Jaxpr, trained: Sequence[bool], scope: str
) -> tuple[list[Product], list[bool]]:
    """Returns the products of a jaxpr, and which of its results depend on training.

    Args:
      trained: which of its arguments depend on what is trained.
      scope: where it is called.
    """
    products = []
    depending = {x for x, depends in zip(jaxpr.invars, trained, strict=True) if depends}
    for equation in jaxpr.eqns:
        place = f"{scope}/{equation.source_info.name_stack}"
        flags = [isinstance(x, core.Var) and x in depending for x in equation.invars]
        if equation.primitive.name in _MACS:
            *_, module = ["", *_MODULE.findall(place)]
            path = tuple(filter(None, module.split("/")))
            macs = _MACS[equation.primitive.name](equation)
            products.append(Product(path, macs, any(flags)))
            results = [any(flags)]
        elif equation.primitive.name == "stop_gradient":
            results = [False]
        else:
            inner, results = _inner(equation, flags, place)
            products += inner
        depending.update(x for x, yes in zip(equation.outvars, results) if yes)
    return products, [isinstance(x, core.Var) and x in depending for x in jaxpr.outvars]


def _inner(
    equation: core.JaxprEqn, flags: list[bool], place: str
) -> tuple[list[Product], list[bool]]:
    """Returns what `_products` does, for the programs inside of an equation."""
    name, params = equation.primitive.name, equation.params
    calls = [_call(program, flags, place, params) for program in _jaxprs(params)]
    of_calls = [products for products, _ in calls]
    results = [any(flags)] * len(equation.outvars)
    # Whether a result depends is known where it is one of the inner program's.
    if calls and all(len(depends) == len(results) for _, depends in calls):
        results = [any(column) for column in zip(*(depends for _, depends in calls))]
    repeats = 1
    if name == "cond":
        general = params.get("branches_platforms")
        of_calls = [of_calls[-1] if general else max(of_calls, key=_total)]
    elif name == "scan":
        repeats = params["length"]
    elif name == "pallas_call":
        repeats = math.prod(params["grid_mapping"].grid)
    elif name == "while" and any(of_calls):
        raise NotImplementedError(
            f"A loop of no fixed length multiplies matrices, in {place}; how often "
            "cannot be read from the program. Write it as a scan."
        )
    products = itertools.chain.from_iterable(of_calls)
    return [x._replace(macs=repeats * x.macs) for x in products], results


def _call(
    jaxpr: core.Jaxpr, flags: list[bool], place: str, params: dict[str, Any]
) -> tuple[list[Product], list[bool]]:
    """Returns what `_products` does, with the arguments of the equation around it."""
    num_arguments = len(jaxpr.invars)
    if num_arguments > len(flags):  # a kernel's results are arguments of its program
        return _products(jaxpr, [any(flags)] * num_arguments, place)
    # A condition's first argument is no argument of its branches.
    flags = flags[len(flags) - num_arguments :]
    products, results = _products(jaxpr, flags, place)
    # What a scan hands on to its next step comes back as an argument.
    first, num_carry = params.get("num_consts", 0), params.get("num_carry", 0)
    carried = slice(first, first + num_carry)
    while any(new > old for new, old in zip(results, flags[carried])):
        flags[carried] = results[:num_carry]
        products, results = _products(jaxpr, flags, place)
    return products, results


def _total(products: list[Product]) -> int:
    return sum(product.macs for product in products)


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Yields the programs inside of an equation."""
    for value in params.values():
        for program in value if isinstance(value, tuple) else (value,):
            program = getattr(program, "jaxpr", program)  # of a closed one
            if isinstance(program, core.Jaxpr):
                yield program


def _of_matrices(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    depth = math.prod(shape[axis] for axis in contracted)
    return depth * math.prod(equation.outvars[0].aval.shape)


def _of_convolution(equation: core.JaxprEqn) -> int:
    _, inputs, *window = equation.params["dimension_numbers"].rhs_spec
    shape = equation.invars[1].aval.shape  # `inputs` are those of one group
    depth = math.prod(shape[axis] for axis in (inputs, *window))
    return depth * math.prod(equation.outvars[0].aval.shape)


_MACS = {"dot_general": _of_matrices, "conv_general_dilated": _of_convolution}
