"""ViT-S/16, fine-tuned on ImageNet-1k with all its parameters.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1; rates and decays of its published script, which CrossMAE takes over (Fu et
al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

    python -m crossmae_jax.main --config=configs/finetune_vits.py \\
        --workdir=runs/finetune_vits --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1 (arXiv 2401.14391, table 1): 78.9 from MAE, 79.2 from
CrossMAE 0.25, 79.3 from CrossMAE 0.75, each pre-trained for 800 epochs.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=100.0)
    config.model = common.classifier("S/16", drop_path=0.1)
    config.data = common.labelled(
        common.imagenet(image_size=(224, 224), batch_size=1024)
    )
    config.data.num_classes = 1000
    config.evals = common.accuracy()
    return config
