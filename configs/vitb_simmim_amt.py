"""AMT on SimMIM, ViT-B/16: squares are masked by what the model looks at.

Gui et al., arXiv 2211.15362, see configs/vitb_amt.py. Of 49 squares of 32 pixels 22 are
masked, 13 thrown (they leave the encoder) and 14 visible; until there are maps, 30 are
masked as in SimMIM. Places are told by learned positions, not by a bias.

    python -m crossmae_jax.main --config=configs/vitb_simmim_amt.py \\
        --workdir=runs/vitb_simmim_amt --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 200 epochs: 80.7 fine-tuned (arXiv 2411.15746, table 6).
Measured by us: nothing yet.
"""

from configs import common, vitb_simmim


def get_config():
    """Returns the experiment."""
    config = vitb_simmim.get_config()
    config.epochs = 200.0
    config.model.encoder.update(positions="learned", relative_bias="none")
    config.attention_maps = common.attention_maps(every_epochs=40.0, mask_ratio=0.6)
    config.masking.update(
        mask_ratio=0.7, pred_ratio=0.7, throw_ratio=0.26, throw_by="unit",
        noise="weighted",
    )
    config.optim.update(schedule="cosine", drop_epochs=())
    config.data.update(transform="weighted", weights_grid=(7, 7))
    return config
