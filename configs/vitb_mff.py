"""MFF, ViT-B/16: MAE whose decoder sees shallow blocks, too.

Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability", arXiv
2308.00261: six blocks' outputs, projected and weighted, take the place of the last one
while pre-training; what is fine-tuned is the plain encoder. The published recipe crops
otherwise: the shorter side to 224, a border of 4, and a random 224 x 224 of that;
here images are cropped as MAE crops them. Biases of the encoder MLPs start at 0, there
within 1e-6 of it.

With progressive reconstruction (PR-MIM): configs/vitb_mff_prmim.py.

    python -m crossmae_jax.main --config=configs/vitb_mff.py \\
        --workdir=runs/vitb_mff --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 800 epochs: 83.7 fine-tuned, 68.3 linear; at 300 epochs
83.0 and 64.2 (all from mmpretrain's page of it). As a baseline of PR-MIM (arXiv
2411.15746) 83.6 fine-tuned at 800 epochs.
Measured by us: nothing yet.
"""

from configs import vitb_mae


def get_config():
    """Returns the experiment."""
    config = vitb_mae.get_config()
    config.model.fusion.update(kind="multi_level", maps=(0, 2, 4, 6, 8, 11))
    config.optim.decay_tokens = False
    return config
