"""SimMIM with a small Swin, on 1797 real handwritten digits.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886, at
the scale of digits: two stages of 8 x 8 and 4 x 4 cells, windows of 4, and squares of 4
pixels are masked, as in configs/digits_simmim.py.

    python -m crossmae_jax.main --config=configs/digits_simmim_swin.py \\
        --workdir=runs/digits_simmim_swin

Published: no paper has this configuration.
Measured by us: see docs/frameworks.md.
"""

from configs import common, digits_simmim


def get_config():
    """Returns the experiment."""
    config = digits_simmim.get_config()
    config.model = common.simmim_swin("W32-D2.2-H2.4/2", window=4)
    config.model.update(dtype="float32", remat="none")
    config.masking.unit = 1
    config.optim.base_lr = 1e-2
    config.evals.knn.pools = ("mean",)
    return config
