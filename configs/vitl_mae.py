"""MAE, ViT-L/16.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

    python -m crossmae_jax.main --config=configs/vitl_mae.py \\
        --workdir=runs/vitl_mae --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 85.4 fine-tuned, 73.9 linear probe (arXiv
2401.14391, table 1; arXiv 2111.06377, table 1d). At 1600 epochs (--config.epochs=1600):
85.9 and 75.8 (arXiv 2111.06377).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=800.0, warmup_epochs=40.0)
    config.model = common.mae("L/16", decoder_dim=512, decoder_heads=16)
    config.masking = common.masking(pred_ratio=0.75)
    config.data = common.imagenet(image_size=(224, 224), batch_size=4096)
    config.evals = common.knn() | common.panels()
    return config
