"""TEC, tiny, on 1797 real handwritten digits.

Gao et al., "Towards Sustainable Self-supervised Learning", arXiv 2210.11016, at the
scale of configs/digits_mae.py, a run of which is the teacher: train that first.

    python -m crossmae_jax.main --config=configs/digits_mae.py --workdir=runs/digits_mae
    python -m crossmae_jax.main --config=configs/digits_tec.py \\
        --workdir=runs/digits_tec --config.target.weights=runs/digits_mae

Published: no paper has this configuration.
Measured by us: see docs/frameworks.md.
"""

from configs import common, digits_mae


def get_config():
    """Returns the experiment."""
    config = digits_mae.get_config()
    config.epochs, config.optim.warmup_epochs = 20.0, 2.0
    config.model = common.tec(
        "W64-D4-H4/2", decoder_dim=32, decoder_heads=4, groups=2
    )
    config.model.dtype, config.model.remat = "float32", "none"
    config.target = common.teacher("W64-D4-H4/2", top_k=5)
    config.loss = common.tec_loss()
    config.optim.base_lr = 1.6e-2
    config.data.batch_size = 32
    del config.evals["reconstruction"]
    return config
