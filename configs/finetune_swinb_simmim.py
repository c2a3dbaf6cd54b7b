"""Swin-B pre-trained by SimMIM, fine-tuned on ImageNet-1k.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886,
with the rates of its published code after 800 epochs. Images are of 224 pixels and
windows of 7 cells, to which the biases of windows of 6 are resized. The reference's
cosine begins at epoch 0 and not behind the warm-up.

    python -m crossmae_jax.main --config=configs/finetune_swinb_simmim.py \\
        --workdir=runs/finetune_swinb_simmim --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 84.0 after 800 epochs of pre-training, 83.5 after 100 (the
code's page).
Measured by us: nothing yet.
"""

from configs import common, finetune_vitb_simmim


def get_config():
    """Returns the experiment."""
    config = finetune_vitb_simmim.get_config()
    config.model.encoder = common.swin("B/4", window=7, drop_path=0.1)
    config.model.pool = "normed_mean"
    config.optim.layer_decay = 0.8
    return config
