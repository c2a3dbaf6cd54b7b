"""CrossMAE, tiny, on 1797 real handwritten digits: two minutes on two CPU cores.

Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391, at
the scale of digits of 8 x 8 pixels. They are enlarged to 16 x 16 and cut into 64
patches, so that a patch is one pixel of the original and has values to standardise.

    python -m crossmae_jax.main --config=configs/digits_cross.py \\
        --workdir=runs/digits_cross

Published: no paper has this configuration.
Measured by us: see the README.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=52.0, warmup_epochs=5.0)
    config.log_every_steps = 10
    config.model = common.crossmae(
        "W64-D4-H4/2", decoder_dim=64, decoder_heads=4, decoder_depth=2
    )
    config.model.dtype = "float32"
    config.masking = common.masking(pred_ratio=0.5)
    config.optim.base_lr = 1.2e-2
    config.optim.lr_scale = "none"
    config.data = common.images(
        source="digits", image_size=(16, 16), batch_size=128, channels=1,
        mean=(0.305,), std=(0.376,), eval_split="test",
        # A digit fills its image, and mirrored it is another digit or none.
        crop_scale=(0.6, 1.0), flip=False,
    )
    config.data.workers = 0
    config.checkpoint.every_epochs = 20.0
    config.evals = (
        common.knn(every_epochs=0.0)
        | dict(linear=dict(every_epochs=0.0))
        | common.rank(every_epochs=0.0)
        | common.panels(every_epochs=0.0)
    )
    config.baselines = True
    return config
