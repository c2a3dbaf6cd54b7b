"""PR-MIM on CrossMAE, ViT-B/16.

Progressive reconstruction and furthest sampling (PR-MIM, arXiv 2411.15746) on CrossMAE
(arXiv 2401.14391): the decoder works on as many patches as in configs/vitb_cross.py,
but chosen by furthest sampling, and a depth-wise convolution predicts the masked
patches that CrossMAE leaves out. No paper has combined them; what the convolution finds
at visible places was chosen by measurement (docs/pr_mim.md).

    python -m crossmae_jax.main --config=configs/vitb_cross_prmim.py \\
        --workdir=runs/vitb_cross_prmim --config.data.data_dir=DATA

Published: no paper has this configuration.
Measured by us: nothing yet.
"""

from configs import vitb_cross


def get_config():
    """Returns the experiment."""
    config = vitb_cross.get_config()
    config.masking.update(pred_ratio=0.75, throw_ratio=0.5, retain="furthest")
    config.model.aggregator.kind = "conv"
    config.optim.lr_scale = "none"
    return config
