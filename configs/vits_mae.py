"""MAE, ViT-S/16.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

    python -m crossmae_jax.main --config=configs/vits_mae.py \\
        --workdir=runs/vits_mae --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 78.9 fine-tuned, 49.7 linear probe (arXiv
2401.14391, tables 1 and 12; the MAE paper has no ViT-S).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=800.0, warmup_epochs=40.0)
    config.model = common.mae("S/16", decoder_dim=256, decoder_heads=8)
    config.masking = common.masking(pred_ratio=0.75)
    config.data = common.imagenet(image_size=(224, 224), batch_size=4096)
    config.evals = common.knn() | common.panels()
    return config
