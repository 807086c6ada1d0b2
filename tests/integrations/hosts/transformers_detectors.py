"""Tiny detectors of transformers with random weights, and the image processors beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.integrations.hosts.contract import fill_zeros

WIDE = {"shortest_edge": 64, "longest_edge": 96}
SQUARE = {"height": 64, "width": 64}

STAGES = {
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
HGNET = {
    **{key: value for key, value in STAGES.items() if key != "layer_type"},
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 12, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 12, 16, 20],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "out_features": ["stage2", "stage3"],
}
DECODER = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 16, "num_queries": 5}
DETR = {
    **DECODER,
    "num_labels": 4,
    "use_timm_backbone": False,
    "backbone": None,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
RT_DETR = {
    **DETR,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [12, 16, 20],
    "feat_strides": [8, 16, 32],
    "decoder_in_channels": [16, 16, 16],
    "decoder_n_points": 2,
    "decoder_layers": 2,
}
LW_DETR = {
    **DECODER,
    "num_labels": 4,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_n_points": 2,
    "group_detr": 2,
    "c2f_num_blocks": 1,
}


def resnet(**options: Any) -> Any:
    return hf.ResNetConfig(**{**STAGES, **options})


def config(name: str, **options: Any) -> Any:
    """Of a detector by the beginning of its class's name."""
    kind = getattr(hf, f"{name}Config")
    if name == "Yolos":
        few = {key: value for key, value in VIT.items() if key != "out_features"}
        tokens = {"num_detection_tokens": 5, "intermediate_size": 16, "num_labels": 4}
        return kind(**{**few, **tokens, "image_size": [64, 96], **options})
    if name == "LwDetr":
        windows = {"num_windows": 4, "window_block_indices": [0, 1], "pretrain_image_size": 64}
        made = hf.LwDetrViTConfig(**VIT, **windows)
        return kind(
            **{**LW_DETR, "projector_scale_factors": [1.0], **options}, backbone_config=made
        )
    if name == "RfDetr":
        return kind(**LW_DETR, backbone_config=hf.RfDetrDinov2Config(**VIT, num_windows=2))
    if name.startswith("RTDetr"):
        return kind(**{**RT_DETR, **options}, backbone_config=hf.RTDetrResNetConfig(**STAGES))
    if name in ("DFine", "Deimv2"):
        points = {**RT_DETR, "decoder_n_points": [2, 2, 2]}
        return kind(**{**points, **options}, backbone_config=hf.HGNetV2Config(**HGNET))
    more = {"DabDetr": {"hidden_size": 16}, "DeformableDetr": {"d_model": 32, "decoder_layers": 2}}
    given = {**DETR, **more.get(name, {}), **options}
    return kind(**{"backbone_config": resnet(), **given})


NAMES = (
    "Detr",
    "ConditionalDetr",
    "DeformableDetr",
    "TableTransformer",
    "DabDetr",
    "RTDetr",
    "RTDetrV2",
    "DFine",
    "Deimv2",
    "Yolos",
    "LwDetr",
    "RfDetr",
)
FIXED = ("RTDetr", "RTDetrV2", "DFine", "Deimv2", "LwDetr", "RfDetr")
"""Those whose images are resized to one size."""


def make(name: str, **options: Any) -> Any:
    """In eval mode, with weights that are the same each time, and maps of some size."""
    torch.manual_seed(0)
    model = getattr(hf, f"{name}ForObjectDetection")(config(name, **options)).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return fill_zeros(model)


def save_processor(name: str, folder: Path) -> Path:
    """The processor that goes with `make(name)`."""
    kind: Callable[..., Any] = hf.RTDetrImageProcessor if name in FIXED else hf.DetrImageProcessor
    size = SQUARE if name in FIXED else WIDE
    kind(size=size, do_normalize=True).save_pretrained(folder)
    return folder


def beside(name: str, folder: Path, **options: Any) -> Any:
    """A model that was loaded from where its processor is."""
    model = make(name, **options)
    model.config._name_or_path = str(folder)
    return model
