"""The shapes of attention that the models train with, and small ones like them."""

from typing import NamedTuple


class Case(NamedTuple):
    """Lengths and heads of one attention.

    Attributes:
      bias: None, "shared" by all images, or "per image".
    """

    name: str
    queries: int
    keys: int
    num_heads: int
    dim: int
    bias: str | None = None


CASES = (
    Case("encoder B 0.75", 50, 50, 12, 64),
    Case("encoder L 0.75", 50, 50, 16, 64),
    Case("encoder H 0.75", 65, 65, 16, 80),
    Case("encoder PR-MIM", 49, 49, 12, 64),
    Case("encoder B 0.5", 98, 98, 12, 64),
    Case("encoder B, all", 197, 197, 12, 64),
    Case("encoder H, all", 257, 257, 16, 80),
    Case("decoder MAE", 197, 197, 16, 32),
    Case("decoder H MAE", 257, 257, 16, 32),
    Case("decoder 0.75", 147, 50, 16, 32),
    Case("decoder 0.25", 49, 50, 16, 32),
    Case("decoder 0.5", 98, 50, 16, 32),
    Case("encoder 448", 197, 197, 12, 64),
    Case("448, all", 785, 785, 12, 64),
    Case("decoder 448", 785, 785, 16, 32),
    Case("decoder 448 0.75", 588, 197, 16, 32),
    Case("window", 49, 49, 4, 32, "shared"),
    Case("shifted window", 49, 49, 4, 32, "per image"),
)

# What tests run: every shape above once, heads as few as tell them apart. A program
# takes groups of heads that fill lanes of 128; head sizes of 64 and 32 have two here.
SMALL = (
    Case("50x50x64", 50, 50, 4, 64),
    Case("65x65x80", 65, 65, 2, 80),
    Case("49x49x64", 49, 49, 1, 64),
    Case("98x98x64", 98, 98, 1, 64),
    Case("197x197x64", 197, 197, 1, 64),
    Case("257x257x80", 257, 257, 1, 80),
    Case("197x197x32", 197, 197, 1, 32),
    Case("257x257x32", 257, 257, 1, 32),
    Case("147x50x32", 147, 50, 2, 32),
    Case("49x50x32", 49, 50, 8, 32),
    Case("98x50x32", 98, 50, 1, 32),
    Case("785x785x64", 785, 785, 1, 64),
    Case("785x785x32", 785, 785, 1, 32),
    Case("588x197x32", 588, 197, 1, 32),
    Case("49x49x32-shared", 49, 49, 8, 32, "shared"),
    Case("49x49x32-per-image", 49, 49, 2, 32, "per image"),
)
