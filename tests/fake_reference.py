"""Stand-ins for the files of the PyTorch reference, to run the comparison without it.

A model has as many parameters as ours and none of its layers: what is tested is how the
reference is imported, built and stepped, not what it computes.
"""

from pathlib import Path

_LAYERS = """
import torch
from timm.layers import DropPath
from timm.layers.helpers import to_2tuple

assert to_2tuple(16) == to_2tuple((16, 16)) == (16, 16)


class Fake(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        print("chatter of the reference")  # must not end up in the pipe
        self.options = options
        self.weight = torch.nn.Parameter(torch.zeros(NUM_PARAMS))

    def forward(self, images, mask_ratio, kept_mask_ratio):
        with torch.cuda.amp.autocast():
            product = images.mean((1, 2)) @ torch.ones(images.shape[-1], 1)
        assert product.dtype == torch.DTYPE, product.dtype
        assert (mask_ratio, kept_mask_ratio) in [(0.75, 0.25), (0.75, 0.75)]
        return self.weight.mean() * product.float().mean()
"""
_MODELS = """
from transformer_utils import Fake


class MaskedAutoencoderViT(Fake):
    pass
"""


def write(directory: Path, *, num_params: int, dtype: str = "bfloat16") -> Path:
    """Writes a reference whose models have so many parameters and compute in a type."""
    layers = _LAYERS.replace("NUM_PARAMS", str(num_params)).replace("DTYPE", dtype)
    directory.mkdir()
    (directory / "transformer_utils.py").write_text(layers)
    for name in ("models_cross.py", "models_mae.py"):
        (directory / name).write_text(_MODELS)
    return directory
