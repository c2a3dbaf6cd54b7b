"""Where weights come from that a run begins with, if more is to be said than a path."""

from typing import NamedTuple

from crossmae_jax.kinds import Group


class Origin(NamedTuple):
    """Weights that must be there, and are those of an encoder of its own.

    Attributes:
      path: of any format.
      setting: that says so, such as "target.weights".
      encoder: its settings, as in `config.model.encoder`.
      encoder_setting: where these are, such as "target.encoder".
    """

    path: str
    setting: str
    encoder: Group
    encoder_setting: str
