"""CrossMAE, ViT-H/14, all masked patches predicted.

Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391.

    python -m crossmae_jax.main --config=configs/vith_cross75.py \\
        --workdir=runs/vith_cross75 --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 86.4 fine-tuned (arXiv 2401.14391, table 1).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=800.0, warmup_epochs=40.0)
    config.model = common.crossmae("H/14", decoder_dim=512, decoder_heads=16)
    config.masking = common.masking(pred_ratio=0.75)
    config.data = common.imagenet(image_size=(224, 224), batch_size=4096)
    config.evals = common.knn() | common.panels()
    return config
