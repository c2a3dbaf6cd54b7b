"""ViT-B/16, fine-tuned on Places365-Standard.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
table 6 and appendix A.5, which gives neither rates nor epochs: these are those of
ImageNet.

    python -m crossmae_jax.main --config=configs/transfer_places365_vitb.py \\
        --workdir=runs/transfer_places365_vitb --config.init_from=RUN \\
        --config.data.data_dir=DATA

TFDS has the images with 256 pixels on a side. The weights to start from are those of
pre-training, not of fine-tuning on ImageNet.

Published, top-1: 57.9 from 1600 epochs of MAE (arXiv 2111.06377, table 6); from 800
epochs 57.9 MAE, 57.9 CrossMAE 0.25, 57.8 CrossMAE 0.75 (arXiv 2401.14391, table 16).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=100.0)
    config.model = common.classifier("B/16", drop_path=0.1)
    config.data = common.labelled(common.images(
        source="tfds", name="places365_small", eval_split="validation",
        image_size=(224, 224), batch_size=1024,
    ))
    config.data.num_classes = 365
    config.evals = common.accuracy()
    return config
