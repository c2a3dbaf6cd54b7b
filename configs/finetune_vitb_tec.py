"""ViT-B/16 pre-trained by TEC, fine-tuned on ImageNet-1k.

Gao et al., "Towards Sustainable Self-supervised Learning", arXiv 2210.11016, after 300
epochs with MAE's ViT-B as the teacher. After 300 with iBOT's
--config.optim.layer_decay=0.5 --config.optim.warmup_epochs=5.0. After 800 epochs its
code has --config.optim.layer_decay=0.55; with which teacher is not told.

    python -m crossmae_jax.main --config=configs/finetune_vitb_tec.py \\
        --workdir=runs/finetune_vitb_tec --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 84.7 after 300 epochs of pre-training (the paper).
Measured by us: nothing yet.
"""

from configs import finetune_vitb


def get_config():
    """Returns the experiment."""
    config = finetune_vitb.get_config()
    config.optim.warmup_epochs = 20.0
    return config
