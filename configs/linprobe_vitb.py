"""ViT-B/16, of which a linear classifier is trained on ImageNet-1k.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1.

    python -m crossmae_jax.main --config=configs/linprobe_vitb.py \\
        --workdir=runs/linprobe_vitb --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 68.0 from 1600 epochs of MAE (arXiv 2111.06377), from 800
65.1, and 65.4 from CrossMAE (arXiv 2401.14391, table 12). An encoder of CrossMAE has no
final norm: here a new one, never trained, stands before the batch norm. What the paper
did is not known.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.linear_probe(epochs=90.0)
    config.model = common.probed("B/16")
    config.data = common.labelled(
        common.imagenet(image_size=(224, 224), batch_size=16384), randaug_ops=0
    )
    config.data.crop = "single_try"
    config.data.num_classes = 1000
    config.evals = common.accuracy()
    return config
