"""The model up to a site, as a `featxfer.Backbone`: plain features and their hashes."""

from __future__ import annotations

from torch import Tensor, nn

from featxfer import Backbone, Preprocessing
from featxfer.features.backbone import describe_module, sha256_of
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.mechanism.capture import in_dtype, take_feature
from featxfer_integrations.mechanism.fingerprint import backbone_sha256, libraries
from featxfer_integrations.mechanism.site import CHILD, Site


class FeatureAt(nn.Module):
    """Images `(n, 3, h, w)` -> the plain feature at a site, a row an image.

    Args:
        model: what is attached to it is left out.
        site: with its layout known.
        flat: whether all numbers that pass are the row, or maps are averaged over their plane.
    """

    def __init__(self, model: nn.Module, site: Site, *, flat: bool = False) -> None:
        super().__init__()
        self.model, self.site, self.flat = model, site, flat

    def forward(self, images: Tensor) -> Tensor:
        """What arrives at the site when the model runs, `(n, d)`."""
        feature = take_feature(self.model, self.site, in_dtype(self.model, images))
        return feature.flatten(1) if self.flat else self.site.pool(feature)


class _HostBackbone(Backbone):
    """Its hashes leave out what is attached and the classifier: features do not hang on them."""

    module: FeatureAt
    owner: Host

    @property
    def weights_sha256(self) -> str:
        return backbone_sha256(self.owner, self.module.model, self.module.site)

    @property
    def architecture_sha256(self) -> str:
        described = describe_module(self.module.model, leave_out=CHILD)
        return sha256_of([described, self.module.site.name, self.module.flat])


def backbone_at(
    host: Host, model: nn.Module, site: Site, preprocessing: Preprocessing, *, flat: bool = False
) -> Backbone:
    """The model up to `site`, without what is attached, as a frozen feature extractor."""
    backbone = _HostBackbone(
        FeatureAt(model, site, flat=flat),
        preprocessing,
        host.model_name(model),
        "the model's own",
        libraries(model),
    )
    object.__setattr__(backbone, "owner", host)
    return backbone
