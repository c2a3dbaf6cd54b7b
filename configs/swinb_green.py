"""GreenMIM, Swin-B: only visible squares are in the encoder, one mask for many images.

Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling", arXiv
2205.13515, with the recipe of its published code for windows of 7 cells: 12 of 49
squares of 32 pixels are visible, a decoder of one block predicts the others. Images of
a device share a mask: 512, of 4096 on eight devices. Its code gives the decoder each
visible feature with the position of another one (docs/frameworks.md); here each has its
own.

    python -m crossmae_jax.main --config=configs/swinb_green.py \\
        --workdir=runs/swinb_green --config.data.data_dir=DATA

Published, ImageNet-1k top-1 at 200 epochs: 83.8 fine-tuned (the code's page).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=200.0, warmup_epochs=40.0)
    config.model = common.green("B/4", window=7)
    config.masking = common.masking(pred_ratio=0.75) | dict(
        noise="shared", together=512  # a device's share of the batch
    )
    config.optim.decay_tokens = False  # nor do tables of biases
    config.data = common.imagenet(image_size=(224, 224), batch_size=4096)
    config.evals = common.knn(pools=("mean",)) | common.panels()
    return config
