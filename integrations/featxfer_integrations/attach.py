"""attach_transfer and its kin: ask the model what it is, find the place, check, attach."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from featxfer import Degradation, FeatureTransferBlock, FeatureTransferHead, Preprocessing
from featxfer.artifact import check_fit, load_head
from featxfer.backbone import frozen, weights_sha256
from featxfer.hub import TransferModule, find_files
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    Transfers,
    attached_at,
    channel_axis,
    check_host,
    disabled,
    host_parameter,
    install,
    is_attached,
    remove_all,
    take_feature,
    transfers_of,
)

M = TypeVar("M", bound=nn.Module)
INPUT_SIZE = 224


class HostModule(Protocol):
    """What this package's module for a host knows of the host's models."""

    def pooled_place(self, model: nn.Module) -> Place:
        """After pool5: where the classifier's input is."""
        ...

    def stage_module(self, model: nn.Module, stage: int) -> str:
        """Name of the module that ends a stage of feature maps."""
        ...

    def deep_modules(self, model: nn.Module) -> list[str]:
        """Names of the modules that end the last stages of 1/16 and 1/32 of the image's size."""
        ...

    def model_name(self, model: nn.Module) -> str:
        """As `load_backbone` takes it."""
        ...

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        """Of the model's weights."""
        ...

    def input_size(self, model: nn.Module) -> int:
        """Side of the images that the model is made for, in pixels."""
        ...


def attach_transfer(
    model: M,
    head: TransferModule | str | Path | None = None,
    *,
    output: str | None = None,
    hidden_features: int | None = None,
    where: str | None = None,
    at: str | None = None,
    in_features: int | None = None,
    degradation: Degradation | None = None,
    dtype: torch.dtype | None = None,
) -> M:
    """Attaches a head after pool5, or a block after a stage, and returns the same model.

    The model gains one child, `feature_transfer`, and no filter of it changes. A new head is the
    identity: the model's outputs stay the same, bit for bit, until it is trained. What is attached
    trains, moves, saves and copies with the model; checkpoints of the plain model still load. It
    takes the model's device, dtype and training mode.

    The place is found by what the model says of itself. timm: the input of `get_classifier()`, and
    the result of `forward_head(pre_logits=True)`, so logits and pre-logits features are both
    transferred; `reset_classifier` keeps the head. torchvision: the input of the last classifier
    layer. Headless models (`num_classes=0`, `fc = Identity`): their pooled output.

    With output "clusters" the feature becomes the paper's k cluster logits. The classifier does not
    fit them: it stays in the model, with its weights in the `state_dict`, but is passed by, and the
    model returns the cluster logits. Put a new classifier on them, or `detach_transfer`.

    Args:
        model: a timm or torchvision classification model, with its classifier or headless; any
            other module with `where` or `at`.
        head: a FeatureTransferHead, or with `at` a FeatureTransferBlock; a folder or hub id of a
            saved one; None for a new one.
        output: of a new head: "features" (the default) or "clusters".
        hidden_features: of a new head; of a new block its `hidden_channels`.
        where: name of the module whose output the head transfers, for models that do not say.
        at: attaches a block: "stage0", "stage1", ... (the stages of timm's `feature_info`; of
            torchvision's models the resolutions of their layers, from the highest), or a module's
            name.
        in_features: the feature's width, where only running the model would tell it and an image
            of the size that the model says (224 x 224 if it says none) is not what it takes.
        degradation: of the images that will be seen; a head that was trained on others is warned
            of.
        dtype: of what is attached, by default the model's; torch.bfloat16 halves its size.

    Raises:
        TypeError: no `nn.Module`; a head of another type.
        AttachError: no place (candidates are listed), a place that is taken, a scripted, compiled
            or quantised model. The model is as it was, as with all errors.
        ArtifactError: a saved head that is damaged, of another width or for another backbone.
        FileNotFoundError: no such folder or hub id.
    """
    check_host(model)
    _check_options(head, output, hidden_features, where, at)
    place = find_place(model, where=where, at=at)
    if attached_at(model, place) is not None:
        raise AttachError(
            f"model: something is attached at {place.name!r} already; detach_transfer first"
        )
    options: dict[str, Any] = {} if output is None else {"output": output}
    if hidden_features is not None:
        options["hidden_features" if at is None else "hidden_channels"] = hidden_features
    if at is not None:
        width, options["layout"], _ = maps_at(model, place)
    else:
        width = in_features or place.width or _width_at(model, place)
        if place.width not in (None, width):
            raise ValueError(f"in_features: got {in_features}, the model says {place.width}")
    kind = FeatureTransferHead if at is None else FeatureTransferBlock
    if head is None:
        module: TransferModule = kind(width, **options)
    else:
        module = head if isinstance(head, TransferModule) else load_head(find_files(head))[0]
        source = "head" if module is head else str(head)
        if not isinstance(module, kind):
            raise AttachError(
                f"{source}: got a {module.kind}, wanted a {kind.kind} "
                f"({'a block needs at=' if at is None else 'a head takes no at='})"
            )
        sha256 = None if module.card is None else backbone_sha256(model, place)
        check_fit(module, module.card, source, in_features=width, backbone_sha256=sha256)
        _warn_of_degradation(module, degradation)
    install(model, place, module, dtype)
    return model


def save_transfers(model: nn.Module, folder: str | Path) -> Path:
    """Writes all that is attached into `folder`, a subfolder a place, and returns it.

    Raises `AttachError` if nothing is attached, `FileExistsError` where an earlier save left what
    `load_transfers` would attach besides, and as `save_pretrained` of each: `ValueError` for what
    has no card, `DiskError`.
    """
    transfers = transfers_of(model)
    earlier = sorted(path.parent.name for path in Path(folder).glob("*/card.json"))
    others = [name for name in earlier if name not in transfers]
    if others:
        raise FileExistsError(
            f"folder: {folder} holds what an earlier save had attached at {', '.join(others)}; "
            "wanted a folder without it"
        )
    for name in transfers:
        if transfers[name].card is None:
            raise ValueError(f"model: what is attached at {name!r} has no card; train it first")
    for name in transfers:
        transfers[name].save_pretrained(Path(folder) / name)
    return Path(folder)


def load_transfers(model: M, folder: str | Path, *, degradation: Degradation | None = None) -> M:
    """Attaches all that `save_transfers` wrote, each at its place, and returns the model.

    Args:
        model: of the same weights, with nothing attached.
        folder: as `save_transfers` wrote it.
        degradation: as in `attach_transfer`.

    Raises:
        AttachError: something is attached already. The model is as it was, as with all errors.
        FileNotFoundError: nothing is saved there.
        ArtifactError: as `attach_transfer`.
    """
    check_host(model)
    if is_attached(model):
        raise AttachError("model: something is attached already; detach_transfer first")
    parts = sorted(path.parent for path in Path(folder).glob("*/card.json"))
    if not parts:
        raise FileNotFoundError(f"folder: nothing that save_transfers wrote is in {folder}")
    modules = [load_head(part)[0] for part in parts]
    try:
        for module in modules:
            details = {} if module.card is None else module.card.details
            name = "at" if isinstance(module, FeatureTransferBlock) else "where"
            attach_transfer(model, module, degradation=degradation, **{name: details.get(name)})
    except Exception:
        if is_attached(model):
            remove_all(model)
        raise
    return model


def detach_transfer(model: M) -> M:
    """Takes away all that is attached; the model is as it was before, and is returned.

    Raises `AttachError` if nothing is attached.
    """
    remove_all(model)
    return model


@contextmanager
def transfer_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model gives its plain features; raises `AttachError` if nothing is attached."""
    with disabled(model):
        yield


def train_transfer_only(model: nn.Module) -> list[nn.Parameter]:
    """Sets a model up to train what is attached and nothing else, and returns those parameters.

    The model is set to eval mode (so batch-norm statistics stay) and asks for no gradients; what is
    attached is in training mode and does. `model.train()` would undo the first. Raises
    `AttachError` if nothing is attached.
    """
    transfers = transfers_of(model)
    model.eval().requires_grad_(False)
    transfers.train().requires_grad_(True)
    return list(transfers.parameters())


def find_place(model: nn.Module, *, where: str | None = None, at: str | None = None) -> Place:
    """Where a head (`where`, or after pool5) or a block (`at`) goes; see `attach_transfer`."""
    host = host_of(model)
    stage = (at or "").removeprefix("stage")
    if host is not None and stage != at and stage.isdecimal():
        return module_place(model, host.stage_module(model, int(stage)))
    name = where if at is None else at
    if name is not None:
        return module_place(model, name)
    if host is None:
        raise _no_place(model, "where: wanted the name of a module whose output is the feature")
    return host.pooled_place(model)


def module_place(model: nn.Module, name: str) -> Place:
    """After a module by name. Of a `Sequential` its last module is hooked, also when run alone."""
    modules = dict(model.named_modules())
    if not name or name not in modules or name.startswith(f"{CHILD}."):
        raise _no_place(model, f"where, at: no module {name!r}")
    leaf = name
    while _runs_its_last_child(model.get_submodule(leaf)):
        leaf = f"{leaf}.{list(model.get_submodule(leaf)._modules)[-1]}"
    key = name.replace(".", "_")
    return Place(f"{key}_" if hasattr(Transfers(), key) else key, None, outputs=(leaf,))


def _runs_its_last_child(module: nn.Module) -> bool:
    """Whether a module's result is that of its last child: a `Sequential` as torch has it."""
    return type(module).forward is nn.Sequential.forward and len(module._modules) > 0


def host_of(model: nn.Module) -> HostModule | None:
    """This package's module for the model's library, imported now; None if there is none."""
    for cls in type(model).__mro__:
        library, _, rest = cls.__module__.partition(".")
        if library == "timm":
            return _import_host("timm")
        if library == "torchvision" and rest.count(".") == 1 and rest.startswith("models."):
            return _import_host("torchvision")
    return None


def _import_host(name: str) -> HostModule:
    module: Any = importlib.import_module(f"featxfer_integrations.{name}")
    host: HostModule = module
    return host


def backbone_sha256(model: nn.Module, place: Place) -> str:
    """Hash of the model's weights without what is attached and without the classifiers.

    What is attached after a module that is not the model's own pooled place, such as a block, is
    for the model with any classifier.
    """
    classifiers = place.inputs
    host = host_of(model)
    if host is not None and not classifiers:
        with suppress(AttachError):
            classifiers = host.pooled_place(model).inputs
    left_out = tuple(f"{name}." for name in (CHILD, *classifiers) if name not in place.outputs)
    return weights_sha256(model, leave_out=left_out)


def _width_at(model: nn.Module, place: Place) -> int:
    """Features or channels at `place`, from one run on a black image."""
    shape = _probe(model, place)
    if len(shape) == 2:
        return shape[1]
    if len(shape) == 4:
        return shape[channel_axis(shape)]
    raise AttachError(
        f"where: {', '.join(place.outputs or place.inputs)} gives {shape}, "
        "wanted vectors (n, d) or maps (n, d, h, w)"
    )


def maps_at(model: nn.Module, place: Place) -> tuple[int, str, int]:
    """Channels, layout and side of the maps at `place`: those of a square image are square."""
    shape = _probe(model, place)
    if len(shape) == 4 and shape[2] in (shape[1], shape[3]):
        axis = channel_axis(shape)
        return shape[axis], {1: "nchw", 3: "nhwc"}[axis], shape[2]
    raise AttachError(
        f"at: {', '.join(place.outputs)} gives {shape}, wanted maps (n, c, h, w) or (n, h, w, c)"
    )


def _probe(model: nn.Module, place: Place) -> tuple[int, ...]:
    """Shape of the feature at `place`, from one run on a black image."""
    host, like = host_of(model), host_parameter(model)
    size = INPUT_SIZE if host is None else host.input_size(model)
    image = torch.zeros(1, 3, size, size)
    try:
        with frozen(model):
            image = image if like is None else image.to(like.device, like.dtype)
            feature = take_feature(model, place, image)
    except AttachError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise AttachError(
            f"in_features: the model does not run on an image of 3 x {size} x {size} "
            f"({type(error).__name__}: {error}), so the width at {place.name!r} has to be given"
        ) from error
    return tuple(feature.shape)


def _check_options(
    head: object, output: str | None, hidden: int | None, where: str | None, at: str | None
) -> None:
    if head is not None and not isinstance(head, TransferModule | str | Path):
        raise TypeError(
            f"head: got {type(head).__name__}, wanted a FeatureTransferHead, "
            "a FeatureTransferBlock, a folder or a hub id"
        )
    if head is not None and (output, hidden) != (None, None):
        raise ValueError("output, hidden_features: are for a new head, got a head besides")
    if where is not None and at is not None:
        raise ValueError("where, at: got both; where= attaches a head, at= a block")
    if at is not None and output is not None:
        raise ValueError("output: a block has none, got it with at=")


def _warn_of_degradation(module: TransferModule, degradation: Degradation | None) -> None:
    if module.card is None or not module.card.degradations:
        return
    if degradation in (None, *module.card.degradations):
        return
    trained = ", ".join(d.to_json() for d in module.card.degradations)
    warnings.warn(
        f"degradation: the {module.kind} was trained on {trained}, "
        f"the images are {degradation.to_json() if degradation else None}",
        stacklevel=3,
    )


def _no_place(model: nn.Module, message: str) -> AttachError:
    """The error with the names of modules that could be meant."""
    candidates = [
        name
        for name, module in model.named_modules()
        if name
        and name.partition(".")[0] != CHILD
        and (not list(module.children()) or isinstance(module, nn.Sequential))
    ]
    shown = ", ".join(candidates[-12:]) or "none"
    more = f" (the last 12 of {len(candidates)})" if len(candidates) > 12 else ""
    return AttachError(f"{message}; candidates in {type(model).__name__}{more}: {shown}")
