"""ViT-B/16 pre-trained by LocalMIM, fine-tuned on ImageNet-1k.

Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv
2303.05251, after 1600 epochs; after 100 --config.optim.base_lr=1e-3
--config.optim.layer_decay=0.75 --config.optim.min_lr=1e-6.

    python -m crossmae_jax.main --config=configs/finetune_vitb_local.py \\
        --workdir=runs/finetune_vitb_local --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 84.0 after 1600 epochs of pre-training (the paper), 83.3
after 100 (arXiv 2411.15746, table 4).
Measured by us: nothing yet.
"""

from configs import finetune_vitb


def get_config():
    """Returns the experiment."""
    config = finetune_vitb.get_config()
    config.optim.update(warmup_epochs=20.0, min_lr=1e-5)
    return config
