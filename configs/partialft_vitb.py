"""ViT-B/16, of which the last blocks are fine-tuned on ImageNet-1k.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1; rates and decays of its published script, which CrossMAE takes over (Fu et
al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

    python -m crossmae_jax.main --config=configs/partialft_vitb.py \\
        --workdir=runs/partialft_vitb --config.init_from=RUN \\
        --config.data.data_dir=DATA

Set --config.tune_blocks: 0.0 trains the head alone, 0.5 also the final norm and the MLP
of the last block, 12.0 everything. Fewer blocks need more epochs: 50, 100 or 200.

Published for ViT-L (arXiv 2111.06377, section 4.3, raw pixels, 800 epochs): 79.1 with
0.5, 81.0 with 1, 84.9 with all.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=100.0)
    config.tune_blocks = 1.0
    config.model = common.classifier("B/16", drop_path=0.1) | dict(pool="cls")
    config.data = common.labelled(
        common.imagenet(image_size=(224, 224), batch_size=1024)
    )
    config.data.num_classes = 1000
    config.evals = common.accuracy()
    return config
