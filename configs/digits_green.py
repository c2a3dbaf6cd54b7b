"""GreenMIM, tiny, on 1797 real handwritten digits.

Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling", arXiv
2205.13515, at the scale of digits: two stages of 16 x 16 and 8 x 8 cells, windows of 4;
of 64 squares of 2 pixels 16 are visible, the same in 16 images of a batch.

    python -m crossmae_jax.main --config=configs/digits_green.py \\
        --workdir=runs/digits_green

Published: no paper has this configuration.
Measured by us: see docs/frameworks.md.
"""

from configs import common, digits_mae


def get_config():
    """Returns the experiment."""
    config = digits_mae.get_config()
    config.model = common.green("W24-D1.2-H2.4/1", window=4)
    config.model.decoder.update(dim=64, num_heads=4)
    config.model.update(dtype="float32", remat="none")
    config.masking.update(noise="shared", together=16)
    config.optim.decay_tokens = False
    config.optim.base_lr = 2.4e-2
    config.data.batch_size = 64
    config.evals.knn.pools = ("mean",)
    return config
