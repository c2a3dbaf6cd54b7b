"""TEC, ViT-L/16: a frozen MAE's features and attention are the targets.

Gao et al., "Towards Sustainable Self-supervised Learning", arXiv 2210.11016, see
configs/vitb_tec.py; with MAE's ViT-L as the teacher, and a decoder of width 768.

    python -m crossmae_jax.main --config=configs/vitl_tec.py --workdir=runs/vitl_tec \\
        --config.target.weights=TEACHER --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 300 epochs: 86.5 fine-tuned (the paper).
Measured by us: nothing yet.
"""

from configs import common, vitb_tec


def get_config():
    """Returns the experiment."""
    config = vitb_tec.get_config()
    config.epochs = 300.0
    config.model = common.tec("L/16", decoder_dim=768, groups=8)
    config.target = common.teacher("L/16", temperature=1.4)
    return config
