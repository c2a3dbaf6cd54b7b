"""SimMIM, small, on the photographs that come with scikit-image.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886, on
images of 64 x 64 pixels: 64 patches of 8, masked in squares of two by two.

    python -m crossmae_jax data prepare photographs --data_dir=photographs
    python -m crossmae_jax.main --config=configs/photographs_simmim.py \\
        --config.data.dir=photographs/train --config.data.eval_dir=photographs/test \\
        --workdir=runs/photographs_simmim

Published: no paper has this configuration.
Measured by us: docs/frameworks.md.
"""

from configs import common, photographs_cross


def get_config():
    """Returns the experiment."""
    config = photographs_cross.get_config()
    config.epochs, config.optim.warmup_epochs = 12.0, 1.0
    config.model = common.simmim("W64-D3-H4/8")
    config.model.encoder.drop_path = 0.0
    config.model.dtype, config.model.remat = "float32", "none"
    config.masking = common.masking(mask_ratio=0.6, pred_ratio=0.6) | dict(unit=2)
    config.target.normalize = False
    config.loss.kind = "l1"
    config.optim.update(base_lr=2e-2, b2=0.999, decay_tokens=False, clip_norm=5.0)
    config.data.update(
        image_size=(64, 64), batch_size=32, crop_scale=(0.67, 1.0),
        interpolation="bilinear",
    )
    config.checkpoint.every_epochs = 12.0
    config.evals.reconstruction.every_epochs = 0.0
    return config
