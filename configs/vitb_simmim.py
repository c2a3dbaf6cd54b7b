"""SimMIM, ViT-B/16: masked patches are tokens of the encoder, a layer predicts pixels.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", arXiv 2111.09886, as
its published code has it: squares of 32 pixels are masked, the encoder tells places by
one relative position bias, and the loss is the absolute error of pixels. Two things
differ by a little: there the mask token decays, and the error's denominator has 1e-5
more.

    python -m crossmae_jax.main --config=configs/vitb_simmim.py \\
        --workdir=runs/vitb_simmim --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 83.8 fine-tuned (the code's page).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=800.0, warmup_epochs=10.0)
    config.model = common.simmim("B/16")
    config.masking = common.masking(mask_ratio=0.6, pred_ratio=0.6) | dict(unit=2)
    config.target.normalize = False
    config.loss.kind = "l1"
    config.optim.update(
        base_lr=1e-4, base_batch=512, lr_scale="none", warmup_lr=2e-6,
        schedule="step", drop_epochs=(700.0,),
        b2=0.999, decay_tokens=False, clip_norm=5.0,
    )
    config.data = common.imagenet(image_size=(224, 224), batch_size=2048)
    config.data.update(crop_scale=(0.67, 1.0), interpolation="bilinear")
    config.evals = common.knn() | common.panels()
    return config
