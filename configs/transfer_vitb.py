"""ViT-B/16, fine-tuned on any labelled data set of TFDS, CIFAR-10 if no other is named.

He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377,
appendix A.1: the recipe of ImageNet, for no paper gives one for small sets.

    python -m crossmae_jax.main --config=configs/transfer_vitb.py \\
        --workdir=runs/transfer_vitb --config.init_from=RUN \\
        --config.data.data_dir=DATA --config.data.name=oxford_flowers102

Other sets: cifar100 and oxford_iiit_pet as this one; oxford_flowers102 has its test
images in the split "test", too. A set with another name for its split needs
--config.data.eval_split. Small images are enlarged to 224 pixels.

Published: no paper of these has this configuration.
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.finetune(epochs=100.0)
    config.model = common.classifier("B/16", drop_path=0.1)
    config.data = common.labelled(common.images(
        source="tfds", name="cifar10", eval_split="test",
        image_size=(224, 224), batch_size=512,
    ))
    config.evals = common.accuracy()
    return config
