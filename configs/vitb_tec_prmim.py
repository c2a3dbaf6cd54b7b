"""PR-MIM on TEC, ViT-B/16, 300 epochs: both passes of the decoder throw and aggregate.

Progressive reconstruction and furthest sampling (PR-MIM, arXiv 2411.15746) on
configs/vitb_tec.py (TEC, arXiv 2210.11016) with iBOT's ViT-B as the teacher. The paper
does not say how many patches were thrown, nor what becomes of attention: here half are
thrown in both passes, each has a convolution, and all patches have their attention.

    python -m crossmae_jax.main --config=configs/vitb_tec_prmim.py \\
        --workdir=runs/vitb_tec_prmim --config.target.weights=TEACHER \\
        --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 300 epochs: 84.7 fine-tuned, 84.5 with plain throwing
(--config.model.aggregator.kind=none), 84.8 without (arXiv 2411.15746, table 4).
Measured by us: nothing yet.
"""

from configs import common, vitb_tec


def get_config():
    """Returns the experiment."""
    config = vitb_tec.get_config()
    config.epochs = 300.0
    config.target = common.teacher("B/16", top_k=9, temperature=1.0)
    config.optim.lr_scale = "none"
    config.masking.update(throw_ratio=0.5, retain="furthest")
    config.model.aggregator.kind = "conv"
    return config
