"""CrossMAE, ViT-Ti, on the photographs that come with scikit-image: 93 minutes on two
CPU cores that others used as well. It is the model of the notebooks.

Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391, with
a decoder of 4 blocks. Images of 112 x 112 pixels in patches of 8 have the 14 x 14
patches of the paper's.

    python -m crossmae_jax data prepare photographs --data_dir=photographs
    python -m crossmae_jax.main --config=configs/photographs_cross.py \\
        --config.data.dir=photographs/train --config.data.eval_dir=photographs/test \\
        --workdir=runs/photographs_cross

Published: no paper has this configuration.
Measured by us: docs/probing.md.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=100.0, warmup_epochs=5.0)
    config.log_every_steps = 10
    config.model = common.crossmae(
        "Ti/8", decoder_dim=128, decoder_heads=4, decoder_depth=4
    )
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.masking = common.masking(pred_ratio=0.25)
    config.optim.base_lr = 4e-3  # 1e-3 at a batch of 64
    config.optim.lr_scale = "none"
    config.data = common.images(
        source="folder", image_size=(112, 112), batch_size=64
    )
    config.data.eval_crop_ratio = 1.0
    config.checkpoint.every_epochs = 5.0
    config.evals = common.panels(every_epochs=10.0)
    config.evals.reconstruction.num_images = 16
    return config
