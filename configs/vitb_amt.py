"""AMT on MAE, ViT-B/16: what the model looks at is hidden, the middle is thrown.

Gui et al., "Good Helper Is around You: Attention-driven Masked Image Modeling", arXiv
2211.15362. For 40 epochs, the warm-up, this is MAE. From then on the class token's
attention in all training images, made anew every 40 epochs, orders the patches of a
crop at random: 45 % are masked, 40 % thrown (neither seen nor predicted), 15 % visible.
The release cuts these maps by whole-number division, which leaves their corner; here
they are cut by the crop's own box.

    python -m crossmae_jax.main --config=configs/vitb_amt.py \\
        --workdir=runs/vitb_amt --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 400 epochs: 82.8 fine-tuned, with 82.6 for MAE (arXiv
2411.15746, table 6).
Measured by us: nothing yet.
"""

from configs import common, vitb_mae


def get_config():
    """Returns the experiment."""
    config = vitb_mae.get_config()
    config.epochs = 400.0
    config.attention_maps = common.attention_maps(every_epochs=40.0)
    config.masking = common.masking(mask_ratio=0.85, pred_ratio=0.45)
    config.masking.update(noise="weighted", rounding="ceil")
    config.optim.lr_scale = "none"
    config.data.update(transform="weighted", weights_grid=(14, 14))
    return config
