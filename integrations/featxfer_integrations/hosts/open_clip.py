"""open_clip's models: CLIP, CustomTextCLIP and CoCa, or one of their visual towers alone."""

from __future__ import annotations

import warnings
from typing import Any

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from featxfer import Preprocessing
from featxfer_integrations.hosts import base
from featxfer_integrations.hosts.timm import HOST as TIMM
from featxfer_integrations.mechanism import attach
from featxfer_integrations.mechanism.site import AttachError, Site, module_site


class OpenClip(base.Host):
    """open_clip's models; of a whole one, what is attached acts in its visual tower."""

    name = "open_clip"
    tested = "open_clip_torch 3."

    def owns(self, model: nn.Module) -> bool:
        """Whether it is one of open_clip's three visual towers, or holds one as `visual`."""
        return isinstance(_tower(model), ModifiedResNet | TimmModel | VisionTransformer)

    def model_name(self, model: Any) -> str:
        """The model's class: open_clip's models do not keep their builder's name."""
        return f"open_clip/{type(model).__name__}"

    def preprocessing(self, model: Any) -> Preprocessing:
        """Mean and std that the visual tower keeps, or OpenAI's, with a warning."""
        tower = _tower(model)
        config = open_clip.get_model_preprocess_cfg(model)
        if "mean" not in config or "std" not in config:
            warnings.warn(
                f"model: this {type(model).__name__} does not say how its images are normalised, "
                "so OpenAI's mean and std are taken; open_clip.set_model_preprocess_cfg or "
                "FitOptions(preprocessing=) say others",
                stacklevel=2,
            )
            config = vars(open_clip.transform.PreprocessCfg())
        size: int | None = self.input_size(model)
        if isinstance(tower, TimmModel):
            size = TIMM.preprocessing(tower.trunk).input_size
        return Preprocessing(tuple(config["mean"]), tuple(config["std"]), size)

    def head(self, model: Any) -> Site:
        """After the visual tower: what `encode_image(images, normalize=False)` gives."""
        name = "" if _tower(model) is model else "visual"
        has_it = hasattr(type(model), "forward_intermediates")
        methods = {"forward_intermediates": _forward_intermediates} if has_it else {}
        return Site("head", (name,), kind="head", methods=methods)

    def stages(self, model: Any) -> list[str]:
        """Of ResNets the four layers; of timm's trunks as timm's host says."""
        tower = _tower(model)
        names = [f"layer{i}" for i in (1, 2, 3, 4)] if isinstance(tower, ModifiedResNet) else []
        if isinstance(tower, TimmModel):
            names = [f"trunk.{name}" for name in TIMM.stages(tower.trunk)]
        return _inside(model, names)

    def blocks(self, model: Any) -> list[str]:
        """After a third and two thirds of a ViT; after a ResNet's maps of 1/16 and of 1/32."""
        tower = _tower(model)
        if isinstance(tower, TimmModel):
            return _inside(model, [f"trunk.{name}" for name in TIMM.blocks(tower.trunk)])
        if isinstance(tower, ModifiedResNet):
            return _inside(model, ["layer3", "layer4"])
        count = len(tower.transformer.resblocks)
        chosen = sorted({max(i * count // 3, 1) - 1 for i in (1, 2)})
        return _inside(model, [f"transformer.resblocks.{index}" for index in chosen])

    def after(self, model: Any, name: str, kind: str | None = None) -> Site:
        """After a module; a ViT's tokens are of one grid, so patch dropout cannot pass for less."""
        prefix, fixed = self.prefix_tokens(model), isinstance(_tower(model), VisionTransformer)
        return module_site(model, name, kind=kind, prefix=prefix, fixed=fixed)

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """Besides modules the text tower's parameters that are the whole model's own."""
        is_theirs = isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa)
        own = model.named_parameters(recurse=False) if is_theirs else ()
        return (*super().behind(model, site), *(name for name, _ in own))

    def prefix_tokens(self, model: Any) -> int:
        """The class token; of a timm trunk as timm's host says."""
        tower = _tower(model)
        if isinstance(tower, TimmModel):
            return TIMM.prefix_tokens(tower.trunk)
        return int(isinstance(tower, VisionTransformer))


HOST = OpenClip()


def _tower(model: Any) -> Any:
    """The visual tower; what has none is taken for one."""
    return getattr(model, "visual", model)


def _forward_intermediates(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """In place of the model's own, whose image features would not have passed the attached head."""
    result: dict[str, Any] = type(model).forward_intermediates(model, *args, **kwargs)
    if "image_features" in result and attach.transfers_of(model).enabled:
        raise AttachError(
            "forward_intermediates: its image features do not pass the attached head; wanted "
            "intermediates_only=True, or encode_image"
        )
    return result


def _inside(model: Any, names: list[str]) -> list[str]:
    """Names of modules of the tower as the model has them."""
    return names if _tower(model) is model else [f"visual.{name}" for name in names]
