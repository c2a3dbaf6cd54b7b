"""PR-MIM on SimMIM, Swin-B: half of the squares do not enter the encoder.

Progressive reconstruction and furthest sampling (PR-MIM, arXiv 2411.15746) on
configs/swinb_simmim_100.py. The paper has PR-MIM on SimMIM with a ViT and on GreenMIM
with Swin, and not this pair. Here whole squares of 32 pixels are thrown, since merging
needs all cells of one: of 22 masked squares 4 are in the encoder, and 18 are put
together from their neighbours, behind its final norm (config.model.decoder.norm puts it
behind them). Cells attend within the windows of the whole image.

    python -m crossmae_jax.main --config=configs/swinb_simmim_prmim.py \\
        --workdir=runs/swinb_simmim_prmim --config.data.data_dir=DATA

Published: no paper has this configuration.
Measured by us: nothing yet.
"""

from configs import swinb_simmim_100


def get_config():
    """Returns the experiment."""
    config = swinb_simmim_100.get_config()
    config.masking.update(throw_ratio=0.5, retain="furthest")
    config.model.aggregator.kind = "conv"
    return config
