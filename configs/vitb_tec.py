"""TEC, ViT-B/16: a frozen MAE's features and attention are the targets.

Gao et al., "Towards Sustainable Self-supervised Learning", arXiv 2210.11016: MAE's
encoder and masks; a teacher that was trained before sees the whole image. Here it is
MAE's ViT-B, with the patches and temperature that the release has for it.

    python -m crossmae_jax.main --config=configs/vitb_tec.py --workdir=runs/vitb_tec \\
        --config.target.weights=TEACHER --config.data.data_dir=DATA

With iBOT's ViT-B: --config.target.top_k=9 --config.target.temperature=1.0

Published, ImageNet-1k top-1 at 800 epochs: 84.8 fine-tuned; at 300 84.7; with iBOT's
85.1 and 84.8 (the paper).
Measured by us: nothing yet.
"""

from configs import common


def get_config():
    """Returns the experiment."""
    config = common.pretrain(epochs=800.0, warmup_epochs=40.0)
    config.model = common.tec("B/16")
    config.masking = common.masking(pred_ratio=0.75)
    config.target = common.teacher("B/16")
    config.loss = common.tec_loss()
    config.data = common.imagenet(image_size=(224, 224), batch_size=4096)
    config.evals = common.knn()
    return config
