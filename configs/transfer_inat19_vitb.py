"""ViT-B/16, fine-tuned on iNaturalist 2019: 1,010 species, in class folders.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
table 6 and appendix A.5, which gives neither rates nor epochs; 360 epochs and otherwise
the recipe of ImageNet are those of PR-MIM (arXiv 2411.15746, section 4.3).

    python -m crossmae_jax.main --config=configs/transfer_inat19_vitb.py \\
        --workdir=runs/transfer_inat19_vitb --config.init_from=RUN \\
        --config.data.dir=TRAIN --config.data.eval_dir=VAL

TFDS does not have the set. Sort the images of its archive into a folder per category.
The weights to start from are those of pre-training, not of fine-tuning on ImageNet.

Published, top-1: 80.5 from 1600 epochs of MAE (arXiv 2111.06377, table 6); from 800
epochs 79.8 MAE, 79.4 CrossMAE 0.25, 80.1 CrossMAE 0.75 (arXiv 2401.14391, table 16),
and 78.9 MAE, 79.0 PR-MIM (arXiv 2411.15746, table 8).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=360.0)
    config.model = common.classifier("B/16", drop_path=0.1)
    config.data = common.labelled(common.images(
        source="folder", image_size=(224, 224), batch_size=1024,
    ))
    config.data.num_classes = 1010
    config.evals = common.accuracy()
    return config
