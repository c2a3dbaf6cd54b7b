"""Swin-B pre-trained by GreenMIM, fine-tuned on ImageNet-1k.

Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling", arXiv
2205.13515, which fine-tunes with SimMIM's code: see configs/finetune_swinb_simmim.py.
Norms then have Swin's epsilon, 1e-5, and not pre-training's 1e-6.

    python -m crossmae_jax.main --config=configs/finetune_swinb_green.py \\
        --workdir=runs/finetune_swinb_green --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 83.8 after 200 epochs of pre-training (the code's page),
83.2 after 100 (arXiv 2411.15746, table 5).
Measured by us: nothing yet.
"""

from configs import finetune_swinb_simmim


def get_config():
    """Returns the experiment."""
    config = finetune_swinb_simmim.get_config()
    config.optim.layer_decay = 0.9
    config.data.batch_size = 768
    return config
