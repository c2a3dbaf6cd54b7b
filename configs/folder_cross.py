"""CrossMAE, ViT-S/16, on a folder of your own images, on one GPU.

Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv 2401.14391: the
recipe and model of configs/vits_cross.py, at a batch meant for one GPU. Folders may be
nested in any way; labels are not needed.

    python -m crossmae_jax.main --config=configs/folder_cross.py --workdir=runs/mine \\
        --config.data.dir=DIR

Class folders and other images to test on: configs/folder_cross_knn.py.
Out of memory: --config.optim.accum_steps=4 works through the batch in four parts.
Few images: raise --config.epochs; a model learns by steps, not by epochs.

Published: no paper has this configuration.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=400.0, warmup_epochs=20.0)
    config.model = common.crossmae("S/16", decoder_dim=256, decoder_heads=8)
    config.masking = common.masking(pred_ratio=0.25)
    config.data = common.images(
        source="folder", image_size=(224, 224), batch_size=512
    )
    config.evals = common.panels() | common.rank()
    return config
