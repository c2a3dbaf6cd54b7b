"""ViT-B/16 at 448 pixels, fine-tuned on ImageNet-1k with all its parameters.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1; rates and decays of its published script, which CrossMAE takes over (Fu et
al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391).

    python -m crossmae_jax.main --config=configs/finetune_vitb_448.py \\
        --workdir=runs/finetune_vitb_448 --config.init_from=RUN \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1: 84.6 from CrossMAE 0.25, pre-trained at 448 for 400 epochs
(arXiv 2401.14391). Images are evaluated whole: resized to 448, not cropped from 512.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=100.0)
    config.model = common.classifier("B/16", drop_path=0.1)
    config.data = common.labelled(
        common.imagenet(image_size=(448, 448), batch_size=1024)
    )
    config.data.num_classes = 1000
    config.data.eval_crop_ratio = 1.0
    config.evals = common.accuracy()
    return config
