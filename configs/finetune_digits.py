"""The encoder of configs/digits_cross.py, fine-tuned on a CPU.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1, at the scale of digits of 8 x 8 pixels.

    python -m crossmae_jax.main --config=configs/finetune_digits.py \\
        --workdir=runs/finetune_digits --config.init_from=runs/digits_cross

Published: no paper has this configuration.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=20.0, warmup_epochs=2.0)
    config.log_every_steps = 10
    config.optim.base_lr = 4e-3
    config.model = common.classifier("W64-D4-H4/2", drop_path=0.05)
    config.model.dtype = "float32"
    config.data = common.labelled(common.images(
        source="digits", image_size=(16, 16), batch_size=128, channels=1,
        mean=(0.305,), std=(0.376,), eval_split="test", flip=False,
    ), randaug_ops=0)
    # A digit fills its image: a small part of one may be part of another.
    config.data.crop_scale = (0.6, 1.0)
    config.data.workers = 0
    config.augment.update(dict(mixup=0.0, cutmix=0.0))
    config.checkpoint.every_epochs = 10.0
    config.evals = common.accuracy()
    return config
