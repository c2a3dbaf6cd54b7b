"""ViT-L/16 pre-trained by TEC, fine-tuned on ImageNet-1k.

Gao et al., "Towards Sustainable Self-supervised Learning", arXiv 2210.11016, after 300
epochs with MAE's ViT-L as the teacher.

    python -m crossmae_jax.main --config=configs/finetune_vitl_tec.py \\
        --workdir=runs/finetune_vitl_tec --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 86.5 after 300 epochs of pre-training (the paper).
Measured by us: nothing yet.
"""

from configs import finetune_vitl


def get_config():
    """Returns the experiment."""
    config = finetune_vitl.get_config()
    config.optim.update(layer_decay=0.65, min_lr=1e-5)
    config.model.encoder.drop_path = 0.1
    return config
