"""LocalMIM, ViT-B/16: four blocks predict oriented gradients at four scales.

Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", arXiv
2303.05251: MAE's encoder and masks; lower blocks predict finer cells.

    python -m crossmae_jax.main --config=configs/vitb_local.py \\
        --workdir=runs/vitb_local --config.data.data_dir=DATA

With the recipe of 100 epochs: --config.epochs=100.0 --config.optim.warmup_epochs=10.0
With pixels for targets, of the same cells: --config.target.kind=pixels

Published, ImageNet-1k top-1 at 1600 epochs: 84.0 fine-tuned (the paper); at 100 epochs
83.3 (arXiv 2411.15746, table 4).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=1600.0, warmup_epochs=40.0)
    config.model = common.local("B/16")
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.hog()
    config.optim.update(base_lr=2e-4, min_lr=1e-6)
    config.data = common.imagenet(image_size=(224, 224), batch_size=2048)
    config.evals = common.knn() | common.panels()
    return config
