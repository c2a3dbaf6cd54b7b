"""PR-MIM on CrossMAE, tiny, on 1797 real handwritten digits.

Progressive reconstruction and furthest sampling (PR-MIM, arXiv 2411.15746) on
configs/digits_cross.py (CrossMAE, arXiv 2401.14391): a quarter of the patches is
decoded, half of them are put together from their neighbours.

    python -m crossmae_jax.main --config=configs/digits_cross_prmim.py \\
        --workdir=runs/digits_cross_prmim

Published: no paper has this configuration.
Measured by us: see docs/pr_mim.md.
"""

from configs import digits_cross


def get_config():
    """Returns the experiment."""
    config = digits_cross.get_config()
    config.masking.update(pred_ratio=0.75, throw_ratio=0.5, retain="furthest")
    config.model.aggregator.kind = "conv"
    config.optim.lr_scale = "none"
    return config
