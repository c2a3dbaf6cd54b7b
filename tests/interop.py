"""timm and transformers for tests, also beside a PyTorch without CUDA; small models.

    from tests.interop import timm, torch, transformers
"""

import torch

from crossmae_jax.convert import packages

_library = packages.declare_operators()  # what torchvision looks up

import timm  # noqa: E402
import transformers  # noqa: E402

SMALL = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2)
TIMM = {
    "token": dict(img_size=(32, 32), global_pool="token", num_classes=5),
    "mean": dict(img_size=(32, 32), global_pool="avg", num_classes=5),
    "headless": dict(img_size=(32, 32), global_pool="avg", num_classes=0),
    "rectangular": dict(img_size=(16, 40), global_pool="token", num_classes=0),
    "grey": dict(img_size=(32, 32), in_chans=1, global_pool="token", num_classes=5),
    "normless": dict(
        img_size=(32, 32), global_pool="avg", num_classes=0, fc_norm=False,
        final_norm=False,
    ),
}


def _randomise(model):
    """Gives every tensor values of its own: fresh biases and tables are all zeros."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=random))
            if value.ndim == 1 and name.endswith("weight"):  # of a norm
                value.add_(1)
    return model.eval()


def timm_model(case):
    """Returns a random VisionTransformer of timm, one of `TIMM`."""
    model = timm.models.vision_transformer.VisionTransformer(**SMALL, **TIMM[case])
    return _randomise(model)


def hf_model(**changes):
    """Returns a random ViTMAEForPreTraining of transformers."""
    config = transformers.ViTMAEConfig(**dict(
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=128, image_size=32, patch_size=8, layer_norm_eps=1e-6,
             decoder_hidden_size=16, decoder_num_attention_heads=2,
             decoder_num_hidden_layers=2, decoder_intermediate_size=64), **changes
    ))
    return _randomise(transformers.ViTMAEForPreTraining(config))


def vit_model(pooled=False, **changes):
    """Returns a random ViTModel of transformers."""
    config = transformers.ViTConfig(**dict(
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=128, image_size=32, patch_size=8, layer_norm_eps=1e-6),
        **changes,
    ))
    return _randomise(transformers.ViTModel(config, add_pooling_layer=pooled))
