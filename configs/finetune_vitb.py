"""ViT-B/16, fine-tuned on ImageNet-1k with all its parameters.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1; rates and decays of its published script, which CrossMAE takes over (Fu et
al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

    python -m crossmae_jax.main --config=configs/finetune_vitb.py \\
        --workdir=runs/finetune_vitb --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1 (arXiv 2401.14391, table 1): 83.3 from MAE, 83.5 from
CrossMAE 0.25, 83.7 from CrossMAE 0.75, each pre-trained for 800 epochs. From 1600 of
MAE: 83.6 (arXiv 2111.06377, table 3).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=100.0)
    config.model = common.classifier("B/16", drop_path=0.1)
    config.data = common.labelled(
        common.imagenet(image_size=(224, 224), batch_size=1024)
    )
    config.data.num_classes = 1000
    config.evals = common.accuracy()
    return config
