"""AMT on MAE, tiny, on 1797 real handwritten digits.

Gui et al., arXiv 2211.15362, see configs/vitb_amt.py, at the scale of
configs/digits_mae.py: maps are made three times, every 13 of 52 epochs.

    python -m crossmae_jax.main --config=configs/digits_amt.py --workdir=runs/digits_amt

Published: no paper has this configuration.
Measured by us: see docs/frameworks.md.
"""

from configs import common, digits_mae


def get_config():
    """Returns the experiment."""
    config = digits_mae.get_config()
    config.attention_maps = common.attention_maps(every_epochs=13.0)
    config.masking = common.masking(mask_ratio=0.85, pred_ratio=0.45)
    config.masking.update(noise="weighted", rounding="ceil")
    config.data.update(transform="weighted", weights_grid=(8, 8))
    return config
