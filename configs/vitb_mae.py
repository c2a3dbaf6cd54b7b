"""MAE, ViT-B/16.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

    python -m crossmae_jax.main --config=configs/vitb_mae.py \\
        --workdir=runs/vitb_mae --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 83.3 fine-tuned, 65.1 linear probe (arXiv
2401.14391, tables 1 and 12); at 400 epochs with 20 of warm-up 83.0 (table 3). PSNR of
masked patches 20.11 dB (table 13). At 1600 epochs (--config.epochs=1600): 83.6
fine-tuned, 68.0 linear probe (arXiv 2111.06377), 83.6 fine-tuned (CrossMAE's authors).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=800.0, warmup_epochs=40.0)
    config.model = common.mae("B/16", decoder_dim=512, decoder_heads=16)
    config.masking = common.masking(pred_ratio=0.75)
    config.data = common.imagenet(image_size=(224, 224), batch_size=4096)
    config.evals = common.knn() | common.panels()
    return config
