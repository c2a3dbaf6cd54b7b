"""ViT-L/16, fine-tuned on ImageNet-1k with all its parameters.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1; rates and decays of its published script, which CrossMAE takes over (Fu et
al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

    python -m crossmae_jax.main --config=configs/finetune_vitl.py \\
        --workdir=runs/finetune_vitl --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1 (arXiv 2401.14391, table 1): 85.4 from MAE, 85.4 from
CrossMAE 0.25, 85.4 from CrossMAE 0.75, each pre-trained for 800 epochs. From 1600 of
MAE: 85.9 (arXiv 2111.06377, table 3).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=50.0)
    config.optim.base_lr = 1e-3
    config.optim.layer_decay = 0.75
    config.model = common.classifier("L/16", drop_path=0.2)
    config.data = common.labelled(
        common.imagenet(image_size=(224, 224), batch_size=1024)
    )
    config.data.num_classes = 1000
    config.evals = common.accuracy()
    return config
