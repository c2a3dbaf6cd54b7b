"""ViT-B/16, fine-tuned on your own class folders with one GPU.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1; rates and decays of its published script, which CrossMAE takes over (Fu et
al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

    python -m crossmae_jax.main --config=configs/finetune_folder.py \\
        --workdir=runs/finetune_folder --config.init_from=RUN \\
        --config.data.dir=TRAIN --config.data.eval_dir=TEST

Published: no paper has this configuration.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=50.0)
    config.model = common.classifier("B/16", drop_path=0.1)
    config.data = common.labelled(common.images(
        source="folder", image_size=(224, 224), batch_size=128
    ))
    config.evals = common.accuracy()
    return config
