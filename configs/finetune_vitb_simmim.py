"""ViT-B/16 pre-trained by SimMIM, fine-tuned on ImageNet-1k.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886,
with the rates of its published code. Each block gets a relative position bias of its
own, which begins as a copy of the shared one. The reference's cosine begins at epoch 0
and not behind the warm-up.

    python -m crossmae_jax.main --config=configs/finetune_vitb_simmim.py \\
        --workdir=runs/finetune_vitb_simmim --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 83.8 after 800 epochs of pre-training (the code's page),
81.6 after 100 (arXiv 2411.15746, table 4).
Measured by us: nothing yet.
"""

from configs import common, finetune_vitb


def get_config():
    """Returns the experiment."""
    config = finetune_vitb.get_config()
    config.model.encoder.update(common.simmim_vit("B/16", drop_path=0.1))
    config.model.encoder.relative_bias = "per_block"
    config.optim.update(
        base_lr=1.25e-3, base_batch=512, warmup_epochs=20.0, warmup_lr=1e-6,
        min_lr=1e-6, clip_norm=5.0,
    )
    config.data.batch_size = 2048
    return config
