"""attach_transfer and its kin: find the sites, check, attach; save, load and take away.

Sites by name. "head": timm's input of `get_classifier()` and result of `forward_head(pre_logits=
True)` (`reset_classifier` keeps the head); the input of torchvision's last classifier layer; of
headless models their pooled output. "blocks": after the last stages of 1/16 and of 1/32 of the
image's size, or after a third and two thirds of a ViT's blocks. "stage0", "stage1", ...: timm's
`feature_info`, or the resolutions of torchvision's layers. Any other name is that of a module, and
its output is transferred: by a head where vectors or maps of one position pass, or `output` is
given; else by a block.

torchvision's detectors: "boxes": a head where the features of boxes meet the predictor, before
the class scores alone; of detectors without proposals (RetinaNet, FCOS, SSD) at each position
before the last convolution of the classification branch, of SSD a head a level. "backbone": blocks
after the backbone's last maps of 1/8, 1/16 and 1/32 of the image; "fpn": a block at each level of
what the backbone returns; or one of these ("boxes_class3"). Detectors of transformers and
ultralytics: "backbone".

With output "clusters" the feature becomes the paper's k cluster logits. The classifier does not fit
them: it stays in the model, with its weights in the `state_dict`, but is passed by, and the model
returns the cluster logits. Put a new classifier on them, or `detach_transfer`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from featxfer import ArtifactError, BaseDegradation, Degradation, load_head, save_head
from featxfer.modules.artifact import check_fit
from featxfer.modules.base import TransferModule
from featxfer.modules.hub import find_files
from featxfer_integrations.hosts import checked, host_of, unwrapped
from featxfer_integrations.hosts.base import Host, ProbeError, find_sites
from featxfer_integrations.hosts.images import black_image
from featxfer_integrations.mechanism import attach
from featxfer_integrations.mechanism.fingerprint import check_weights
from featxfer_integrations.mechanism.site import AttachError, Site

M = TypeVar("M", bound=nn.Module)


def attach_transfer(
    model: M,
    head: TransferModule | str | Path | None = None,
    *,
    site: str | None = None,
    output: str | None = None,
    hidden_features: int | None = None,
    branch: str = "class",
    in_features: int | None = None,
    degradation: BaseDegradation | None = None,
    dtype: torch.dtype | None = None,
) -> M:
    """Attaches a head after pool5, or a block after a stage, and returns the same model.

    The model gains one child, `feature_transfer`, and no filter of it changes. A new module is the
    identity: the model's outputs stay the same, bit for bit, until it is trained. What is attached
    trains, moves, saves and copies with the model; checkpoints of the plain model still load. It
    takes the model's device, dtype and training mode.

    Args:
        model: of a known host (timm, torchvision, transformers, open_clip, ultralytics, one that
            is registered), or any module with `site`; a `YOLO` stands for the model in it.
        head: a FeatureTransferHead or FeatureTransferBlock; a folder or hub id of a saved one; None
            for a new one.
        site: where, by default "head" or a detector's "boxes"; see the module's description.
        output: of a new head: "features" (the default), or "clusters", the paper's k cluster
            logits, which pass the classifier by.
        hidden_features: of a new head; of a new block its `hidden_channels`.
        branch: of detectors' "boxes": "class", or "both", so that boxes are transferred too.
        in_features: the feature's width, where only running the model would tell it and an image
            of the size that it says (or 224 x 224) is not what it takes.
        degradation: of images that will be seen; a module that was trained on others is warned of.
        dtype: of what is attached, by default the model's; torch.bfloat16 halves its size.

    Raises:
        TypeError: no `nn.Module`; a head of another type.
        AttachError: no such site (candidates are listed), one that is taken, a scripted, compiled
            or quantised model. The model is as it was, as with all errors.
        ArtifactError: a saved module that is damaged, of another width or for another backbone.
        FileNotFoundError: no such folder or hub id.
    """
    outer, model = model, checked(model)
    _check_arguments(head, output, hidden_features, dtype)
    host = host_of(model)
    given = head if isinstance(head, TransferModule | None) else load_head(find_files(head))[0]
    wanted = "head" if output is not None else None if given is None else given.kind
    sites = _sites(given, host, model, site, branch, kind=wanted, width=in_features)
    _check_free(model, sites)
    if given is None:
        modules = _new_modules(host, model, sites, output, hidden_features)
    else:
        _check_given(host, model, sites, given, "head" if given is head else str(head))
        _warn(model, given, degradation)
        modules = [given]
    for place, module in zip(sites, modules, strict=True):
        attach.install(model, place, module, dtype)
    if outer is not model:
        attach.transfers_of(model).share()
    return outer


def _sites(module: TransferModule | None, *asked: Any, **known: Any) -> list[Site]:
    """As `find_sites`; where its image is none that the model takes, by one as in training."""
    try:
        return find_sites(*asked, **known)
    except ProbeError:
        views = () if module is None or module.card is None else module.card.degradations
        sizes = [view.hr_size for view in views if isinstance(view, Degradation)]
        if not sizes:
            raise
        image = black_image(asked[1], sizes[0], sizes[0])[:, :1].repeat(1, 3, 1, 1)
        return find_sites(*asked, **known, image=image)


def _new_modules(
    host: Host, model: nn.Module, sites: list[Site], output: str | None, hidden: int | None
) -> list[TransferModule]:
    """Untrained modules for sites, on the model's device."""
    named: dict[str, Any] = {} if output is None else {"output": output}
    if output is not None and any(site.is_block for site in sites):
        raise ValueError(f"output: a block has none, got it with site={sites[0].asked!r}")
    if output == "clusters":
        for site in sites:
            _refuse_clusters(host, model, site, "output")
    modules: list[TransferModule] = []
    for site in sites:
        if hidden is not None:
            named["hidden_channels" if site.is_block else "hidden_features"] = hidden
        with attach.host_device(model):
            modules.append(site.module_class(**site.sizes, **named))
    return modules


def _check_free(model: nn.Module, sites: list[Site]) -> None:
    """Raises `AttachError` for a site that is taken, or a method of the instance's own."""
    taken = [site.name for site in sites if attach.attached_at(model, site) is not None]
    if taken:
        raise AttachError(
            f"model: something is attached at {', '.join(map(repr, taken))} already; "
            "detach_transfer first"
        )
    own = [name for name in attach.replaced_methods(model, sites) if name in vars(model)]
    if own and not attach.is_attached(model):
        raise AttachError(
            f"model: it has a {own[0]} of its own on this instance, which what is attached would "
            "pass by; wanted a model without"
        )


def _check_given(
    host: Host, model: nn.Module, sites: list[Site], module: TransferModule, source: str
) -> None:
    """Raises `ArtifactError`, `AttachError` or `ValueError` for what does not fit the one site."""
    if len(sites) > 1:
        names = ", ".join(site.name for site in sites)
        raise AttachError(f"head: got one for {len(sites)} sites; name one by site=: {names}")
    (site,) = sites
    if not isinstance(module, site.module_class):
        wanted = site.module_class.kind
        raise AttachError(f"{source}: got a {module.kind}, wanted a {wanted} at {site.name!r}")
    if attach.gives_clusters(module):
        _refuse_clusters(host, model, site, source)
    branch = _details(module).get("branch")
    if branch not in (None, site.branch):
        raise ArtifactError(f"{source}: {module.kind} for branch={branch!r}, got {site.branch!r}")
    check_fit(module, module.card, source, in_features=site.width)
    if module.card is not None:
        check_weights(host, model, site, module.card, f"{source}: {module.kind}")


def _refuse_clusters(host: Host, model: nn.Module, site: Site, source: str) -> None:
    """Raises `ValueError` where cluster logits do not fit, or would not come out as they are."""
    if host.detects:
        raise ValueError(f"{source}: got 'clusters', which a detector's predictor does not fit")
    for name in site.modules if site.side == "input" else ():
        around, _, last = name.rpartition(".")
        layers = dict(model.get_submodule(around).named_children())
        behind = list(layers.values())[list(layers).index(last) + 1 :]
        if around and any(isinstance(layer, nn.ReLU) for layer in behind):
            raise ValueError(
                f"{source}: got 'clusters', whose logits a ReLU of {type(model).__name__} behind "
                f"{name!r} would cut off at zero"
            )


def save_transfers(model: nn.Module, folder: str | Path) -> Path:
    """Writes all that is attached into `folder`, a subfolder a site, and returns it.

    Raises `AttachError` if nothing is attached, `FileExistsError` where an earlier save left what
    `load_transfers` would attach besides, and as `save_pretrained` of each: `ValueError` for what
    has no card, `DiskError`.
    """
    transfers = attach.transfers_of(model)
    earlier = sorted(path.parent.name for path in Path(folder).glob("*/card.json"))
    others = [name for name in earlier if name not in transfers]
    if others:
        raise FileExistsError(
            f"folder: {folder} holds what an earlier save had attached at {', '.join(others)}; "
            "wanted a folder without it"
        )
    cards = {}
    for name in transfers:
        card = transfers[name].card
        if card is None:
            raise ValueError(f"model: what is attached at {name!r} has no card; train it first")
        cards[name] = card
    for name, card in cards.items():
        save_head(transfers[name], Path(folder) / name, card)
    return Path(folder)


def load_transfers(
    model: M, folder: str | Path, *, degradation: BaseDegradation | None = None
) -> M:
    """Attaches all that `save_transfers` wrote, each at its site, and returns the model.

    Args:
        model: of the same weights, with nothing attached.
        folder: as `save_transfers` wrote it.
        degradation: as in `attach_transfer`.

    Raises:
        AttachError: something is attached already. The model is as it was, as with all errors.
        FileNotFoundError: nothing is saved there.
        ArtifactError: as `attach_transfer`.
    """
    outer, model = model, checked(model)
    if attach.is_attached(model):
        raise AttachError("model: something is attached already; detach_transfer first")
    parts = sorted(path.parent for path in Path(folder).glob("*/card.json"))
    if not parts:
        raise FileNotFoundError(f"folder: nothing that save_transfers wrote is in {folder}")
    modules = [load_head(part)[0] for part in parts]
    modules.sort(key=lambda module: bool(_details(module).get("after")))
    try:
        for module in modules:
            details = _details(module)
            named = {name: details[name] for name in ("site", "branch") if name in details}
            attach_transfer(outer, module, degradation=degradation, **named)
    except Exception:
        if attach.is_attached(model):
            attach.uninstall(model)
        raise
    return outer


def _details(module: TransferModule) -> dict[str, Any]:
    return {} if module.card is None else dict(module.card.details)


def detach_transfer(model: M) -> M:
    """Takes away all that is attached; the model is as it was before, and is returned.

    Raises `AttachError` if nothing is attached.
    """
    attach.uninstall(unwrapped(model))
    return model


def train_transfer_only(model: nn.Module) -> list[nn.Parameter]:
    """Sets a model up to train what is attached and nothing else, and returns those parameters.

    The model is set to eval mode (so batch-norm statistics stay) and asks for no gradients; what is
    attached is in training mode and does. `model.train()` would undo the first. Raises
    `AttachError` if nothing is attached.
    """
    transfers = attach.transfers_of(model)
    model.eval().requires_grad_(False)
    transfers.train().requires_grad_(True)
    return list(transfers.parameters())


def _check_arguments(head: object, output: str | None, hidden: int | None, dtype: object) -> None:
    if head is not None and not isinstance(head, TransferModule | str | Path):
        raise TypeError(
            f"head: got {type(head).__name__}, wanted a FeatureTransferHead, "
            "a FeatureTransferBlock, a folder or a hub id"
        )
    if head is not None and (output, hidden) != (None, None):
        raise ValueError("output, hidden_features: are for a new head, got a head besides")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, wanted a floating-point torch.dtype")


def _warn(model: nn.Module, module: TransferModule, degradation: BaseDegradation | None) -> None:
    """Warns of images of other degradations, and of blocks that are not there, than in training."""
    trained = () if module.card is None else module.card.degradations
    if trained and degradation not in (None, *trained):
        told = ", ".join(view.to_json() for view in trained)
        warnings.warn(
            f"degradation: the {module.kind} was trained on {told}, "
            f"the images are {degradation.to_json() if degradation else None}",
            stacklevel=3,
        )
    known = {site.name for site in attach.attached_sites(model)}
    missing = [name for name in _details(module).get("after", []) if name not in known]
    if missing:
        warnings.warn(
            f"head: it was trained behind blocks at {', '.join(missing)}, which are not attached",
            stacklevel=3,
        )
