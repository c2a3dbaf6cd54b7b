"""PR-MIM on LocalMIM, ViT-B/16, 100 epochs: each small decoder throws and aggregates.

Progressive reconstruction and furthest sampling (PR-MIM, arXiv 2411.15746) on
configs/vitb_local.py (LocalMIM, arXiv 2303.05251). The paper does not say where the
convolution stands nor how many patches were thrown: here it stands on the grid of
patches, behind each decoder's block and before its norm, and half are thrown.

    python -m crossmae_jax.main --config=configs/vitb_local_prmim.py \\
        --workdir=runs/vitb_local_prmim --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 100 epochs: 83.3 fine-tuned, 82.9 with plain throwing
(--config.model.aggregator.kind=none), 83.3 without (arXiv 2411.15746, table 4).
Measured by us: nothing yet.
"""

from configs import vitb_local


def get_config():
    """Returns the experiment."""
    config = vitb_local.get_config()
    config.epochs, config.optim.warmup_epochs = 100.0, 10.0
    config.optim.lr_scale = "none"
    config.masking.update(throw_ratio=0.5, retain="furthest")
    config.model.aggregator.kind = "conv"
    return config
