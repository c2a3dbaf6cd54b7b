"""ViT-L/16 pre-trained by LocalMIM, fine-tuned on ImageNet-1k.

Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv
2303.05251.

    python -m crossmae_jax.main --config=configs/finetune_vitl_local.py \\
        --workdir=runs/finetune_vitl_local --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 85.8 after 800 epochs of pre-training (the paper).
Measured by us: nothing yet.
"""

from configs import finetune_vitl


def get_config():
    """Returns the experiment."""
    config = finetune_vitl.get_config()
    config.optim.base_lr = 7.5e-4
    return config
