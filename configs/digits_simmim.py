"""SimMIM, tiny, on 1797 real handwritten digits.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886, at
the scale of digits: squares of two by two patches are masked. All patches are in the
encoder, so that it is smaller than that of configs/digits_cross.py. Crops are SimMIM's,
at least 67 % of the area. Batches are of 32: in 225 steps of 128 images the loss came
down to 0.51 and stayed there, in 1442 of 32, at little more cost, it goes on to 0.36.

    python -m crossmae_jax.main --config=configs/digits_simmim.py \\
        --workdir=runs/digits_simmim

Published: no paper has this configuration.
Measured by us: see docs/frameworks.md.
"""

from configs import common, digits_cross


def get_config():
    """Returns the experiment."""
    config = digits_cross.get_config()
    config.epochs, config.optim.warmup_epochs = 32.0, 2.0
    config.model = common.simmim("W48-D3-H4/2")
    config.model.encoder.drop_path = 0.0
    config.model.dtype, config.model.remat = "float32", "none"
    config.masking = common.masking(mask_ratio=0.6, pred_ratio=0.6) | dict(unit=2)
    config.target.normalize = False
    config.loss.kind = "l1"
    config.optim.update(
        base_lr=2e-2, lr_scale="none", b2=0.999, decay_tokens=False, clip_norm=5.0
    )
    config.data.update(batch_size=32, crop_scale=(0.67, 1.0))
    return config
