"""attach_transfer and its kin: ask the model what it is, find the place, check, attach."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from featxfer import BaseDegradation, FeatureTransferHead, Preprocessing
from featxfer.features.backbone import frozen, weights_sha256
from featxfer.modules.artifact import ArtifactError, Card, check_fit, load_head
from featxfer.modules.hub import TransferModule, find_files
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    Transfers,
    attached_at,
    black_image,
    channel_axis,
    check_host,
    disabled,
    disturbed,
    host_device,
    host_parameter,
    install,
    is_attached,
    module_place,
    no_place,
    remove_all,
    said_sides,
    take_feature,
    transfers_of,
    uninstall,
)

M = TypeVar("M", bound=nn.Module)
INPUT_SIZE = 224

LOWER_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that weights are rounded to when a model is deployed."""

DETECTORS = ("GeneralizedRCNN", "RetinaNet", "FCOS", "SSD")
"""torchvision's detectors, by their class or a base of it."""


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

    def behind(self, model: nn.Module, place: Place) -> tuple[str, ...]:
        """Names of the modules that what is trained at a place does not hang on."""
        ...


class DetectorHost(HostModule, Protocol):
    """What this package's module for detectors knows besides."""

    def places(self, model: nn.Module, where: str, branch: str) -> list[Place]:
        """The places that a name stands for; none for the name of a module."""
        ...

    def block_place(self, model: nn.Module, name: str) -> Place:
        """After a module by name."""
        ...

    def answers(self, model: nn.Module, images: Tensor) -> Any:
        """All that the heads say of images, before anything is left out for its score."""
        ...


def attach_transfer(
    model: M,
    head: TransferModule | str | Path | None = None,
    *,
    output: str | None = None,
    hidden_features: int | None = None,
    where: str | None = None,
    at: str | None = None,
    branch: str = "class",
    in_features: int | None = None,
    degradation: BaseDegradation | None = None,
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

    torchvision's detectors: `where="boxes"`, the default, attaches a head where the features of
    boxes meet the predictor, by default before the class scores alone; of detectors without
    proposals (RetinaNet, FCOS, SSD) at each position before the last convolution of the
    classification branch, and of SSD, whose levels have branches of their own, a head a level.
    `where="backbone"` attaches blocks after the backbone's last maps of 1/8, 1/16 and 1/32 of the
    image, `where="fpn"` a block at each level of what the backbone returns.

    With output "clusters" the feature becomes the paper's k cluster logits. The classifier does not
    fit them: it stays in the model, with its weights in the `state_dict`, but is passed by, and the
    model returns the cluster logits. Put a new classifier on them, or `detach_transfer`.

    Args:
        model: a timm or torchvision classification model, with its classifier or headless; a
            torchvision detector, or one made by hand of its classes; any other module with `where`
            or `at`.
        head: a FeatureTransferHead, or with `at` a FeatureTransferBlock; a folder or hub id of a
            saved one; None for a new one.
        output: of a new head: "features" (the default) or "clusters".
        hidden_features: of a new head; of a new block its `hidden_channels`.
        where: name of the module whose output the head transfers, for models that do not say. Of
            detectors "boxes", "backbone", "fpn", or one of their places ("boxes_class3", "fpn0").
        at: attaches a block: "stage0", "stage1", ... (the stages of timm's `feature_info`; of
            torchvision's models the resolutions of their layers, from the highest), or a module's
            name.
        branch: of detectors' "boxes": "class", or "both", so that boxes are transferred too.
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
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, wanted a floating-point torch.dtype")
    places = find_places(model, where=where, at=at, branch=branch)
    taken = [place.name for place in places if attached_at(model, place) is not None]
    if taken:
        raise AttachError(
            f"model: something is attached at {', '.join(map(repr, taken))} already; "
            "detach_transfer first"
        )
    if head is not None and len(places) > 1:
        names = ", ".join(place.name for place in places)
        raise AttachError(f"head: got one for {len(places)} places; name one by where=: {names}")
    if output is not None and any(place.block for place in places):
        raise ValueError(f"output: a block has none, got it with where={where!r}")
    if output == "clusters":
        for place in places:
            _refuse_clusters(model, place, "output")
    own = [name for place in places for name in place.methods if name in vars(model)]
    if own and not is_attached(model):
        raise AttachError(
            f"model: it has a {own[0]} of its own on this instance, which what is attached would "
            "pass by; wanted a model without"
        )
    modules: list[TransferModule] = []
    for place in places:
        width, options = _sizes_at(model, place, in_features)
        if output is not None:
            options["output"] = output
        if hidden_features is not None:
            options["hidden_channels" if place.block else "hidden_features"] = hidden_features
        if head is None:
            with host_device(model):
                modules.append(place.kind(width, **options))
        else:
            modules.append(_given(model, place, head, width, degradation))
    for place, module in zip(places, modules, strict=True):
        install(model, place, module, dtype)
    return model


def _sizes_at(
    model: nn.Module, place: Place, in_features: int | None
) -> tuple[int, dict[str, Any]]:
    """Features or channels at a place, and the layout of a block there."""
    if place.block:
        channels, layout, _ = maps_at(model, place)
        return channels, {"layout": layout}
    said = place.width
    if said is None:
        try:
            said = _width_at(model, place)
        except ProbeError:
            if in_features is None:
                raise
    if said is not None and in_features not in (None, said):
        raise ValueError(f"in_features: got {in_features}, the model says {said}")
    return said or in_features or 0, {}


def _given(
    model: nn.Module,
    place: Place,
    head: TransferModule | str | Path,
    width: int,
    degradation: BaseDegradation | None,
) -> TransferModule:
    """What the caller gives for a place, after all checks."""
    module = head if isinstance(head, TransferModule) else load_head(find_files(head))[0]
    source = "head" if module is head else str(head)
    if not isinstance(module, place.kind):
        raise AttachError(
            f"{source}: got a {module.kind}, wanted a {place.kind.kind} "
            f"({'a head takes no at=' if place.block else 'a block needs at='})"
        )
    if isinstance(module, FeatureTransferHead) and module.output == "clusters":
        _refuse_clusters(model, place, source)
    branch = None if module.card is None else module.card.details.get("branch")
    if branch not in (None, place.branch):
        raise ArtifactError(f"{source}: {module.kind} for branch={branch!r}, got {place.branch!r}")
    check_fit(module, module.card, source, in_features=width)
    if module.card is not None:
        _check_weights(model, place, module.card, f"{source}: {module.kind}")
    _warn_of_degradation(module, degradation)
    _warn_of_blocks(model, module)
    return module


def _refuse_clusters(model: nn.Module, place: Place, source: str) -> None:
    """Raises `ValueError` where cluster logits do not fit, or would not come out as they are."""
    if detector_host(model) is not None:
        raise ValueError(f"{source}: got 'clusters', which a detector's predictor does not fit")
    for name in place.inputs:
        around, _, last = name.rpartition(".")
        layers = dict(model.get_submodule(around).named_children())
        behind = list(layers.values())[list(layers).index(last) + 1 :]
        if around and any(isinstance(layer, nn.ReLU) for layer in behind):
            raise ValueError(
                f"{source}: got 'clusters', whose logits a ReLU of {type(model).__name__} behind "
                f"{name!r} would cut off at zero"
            )


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


def load_transfers(
    model: M, folder: str | Path, *, degradation: BaseDegradation | None = None
) -> M:
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
    modules.sort(key=lambda module: bool(module.card and module.card.details.get("after")))
    try:
        for module in modules:
            details = {} if module.card is None else module.card.details
            said = ("at",) if "at" in details else ("where", "branch")
            place = {name: details[name] for name in said if name in details}
            attach_transfer(model, module, degradation=degradation, **place)
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
    """Inside, the model gives its plain features, in this thread alone (or in this task).

    Raises `AttachError` if nothing is attached.
    """
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


def find_places(
    model: nn.Module, *, where: str | None = None, at: str | None = None, branch: str = "class"
) -> list[Place]:
    """All places that `attach_transfer` attaches at; arguments and errors as there."""
    for name, value in (("where", where), ("at", at)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: got {value!r}, wanted a name")
    detector = detector_host(model)
    if detector is not None and at is None:
        named = detector.places(model, where or "boxes", branch)
        if named:
            return named
        if where not in dict(model.named_modules()):
            wanted = "'boxes', 'backbone', 'fpn', one of their places or the name of a module"
            raise no_place(model, f"where: got {where!r}, wanted {wanted}")
    if branch != "class":
        raise ValueError(f"branch: got {branch!r}, which is for a detector's where='boxes'")
    return [find_place(model, where=where, at=at)]


def find_place(model: nn.Module, *, where: str | None = None, at: str | None = None) -> Place:
    """Where a head (`where`, or after pool5) or a block (`at`) goes; see `attach_transfer`."""
    host = host_of(model)
    if at is not None:
        stage = at.removeprefix("stage")
        if host is not None and stage != at and stage.isdecimal():
            at = host.stage_module(model, int(stage))
        detector = detector_host(model)
        if detector is not None:
            return detector.block_place(model, at)
        return dataclasses.replace(module_place(model, at), block=True)
    if where is not None:
        repeats = detector_host(model) is not None
        return dataclasses.replace(module_place(model, where), repeats=repeats)
    if host is None:
        raise no_place(model, "where: wanted the name of a module whose output is the feature")
    return host.pooled_place(model)


def host_of(model: nn.Module) -> HostModule | None:
    """This package's module for the model's library, imported now; None if there is none."""
    detector = detector_host(model)
    if detector is not None:
        return detector
    for cls in type(model).__mro__:
        library, _, rest = cls.__module__.partition(".")
        of_torchvision = library == "torchvision" and rest.count(".") == 1
        if library == "timm" or (of_torchvision and rest.startswith("models.")):
            host: HostModule = _import_host(library)
            return host
    return None


def detector_host(model: nn.Module) -> DetectorHost | None:
    """This package's module for torchvision's detectors, if the model is one."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("torchvision.models.detection.") and cls.__name__ in DETECTORS:
            detector: DetectorHost = _import_host("torchvision_detection")
            return detector
    return None


def _import_host(name: str) -> Any:
    return importlib.import_module(f"featxfer_integrations.{name}")


def backbone_sha256(model: nn.Module, place: Place, dtype: torch.dtype | None = None) -> str:
    """Hash of the model's weights that what is trained at `place` hangs on, see `weights_sha256`.

    Without what is attached, the classifiers or predictors, and what else runs behind the feature.
    """
    return weights_sha256(model, leave_out=_left_out(model, place), dtype=dtype)


def _left_out(model: nn.Module, place: Place) -> tuple[str, ...]:
    """Beginnings of the names of weights that what is trained at `place` does not hang on."""
    host = host_of(model)
    behind = _behind(model, place) if host is None else host.behind(model, place)
    return tuple(f"{name}." for name in (CHILD, *behind) if name not in place.outputs)


def weights_details(model: nn.Module, place: Place) -> dict[str, Any]:
    """For a card: the dtype of the weights, and their hash in the dtypes that have less room."""
    said = str(_dtype_of(model)).removeprefix("torch.")
    lower = {} if said in LOWER_DTYPES else LOWER_DTYPES
    left_out = _left_out(model, place)
    hashes = {n: weights_sha256(model, leave_out=left_out, dtype=d) for n, d in lower.items()}
    return {"dtype": said, "sha256_in": hashes}


def _check_weights(model: nn.Module, place: Place, card: Card, source: str) -> None:
    """Raises `ArtifactError` for a card of other weights, in whatever dtype either has them."""
    now = str(_dtype_of(model)).removeprefix("torch.")
    trained = str(card.details.get("dtype", "float32"))
    wanted, dtype = card.backbone_sha256, None
    if now in LOWER_DTYPES and now != trained:  # this model's weights were rounded since
        wanted = str(card.details.get("sha256_in", {}).get(now, ""))
    elif trained in LOWER_DTYPES:
        dtype = LOWER_DTYPES[trained]
    got = backbone_sha256(model, place, dtype)
    if got != wanted:
        of = f"in {trained}" if wanted else f"in {trained} alone"
        raise ArtifactError(
            f"{source} for backbone {card.backbone} with weights {card.backbone_sha256[:12]} "
            f"{of}, wanted weights {got[:12]} in {now}"
        )


def _dtype_of(model: nn.Module) -> torch.dtype:
    like = host_parameter(model)
    return torch.float32 if like is None else like.dtype


def _behind(model: nn.Module, place: Place) -> tuple[str, ...]:
    """Names of modules of a model of no known host that run once the place has been reached.

    The inputs alone where the model does not run that far on a black image. Weights of a module
    that is not called itself count as those of the module around it.
    """
    begun: set[str] = set()
    running: set[str] = set()
    reached: set[str] | None = None

    def begin(name: str) -> None:
        nonlocal reached
        if reached is None and name in place.inputs:
            reached = set(running)
        if reached is None:
            begun.add(name)
            running.add(name)

    def end(name: str) -> None:
        nonlocal reached
        if reached is None:
            running.discard(name)
            if name in place.outputs:
                reached = set(running)

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: begin(name), prepend=True),
            module.register_forward_hook(lambda *_, name=name: end(name)),
        ]
    try:
        _probe(model, place)
    except ProbeError:
        if reached is None:
            return place.inputs
    finally:
        for handle in handles:
            handle.remove()
    around = running if reached is None else reached
    return tuple(
        name
        for name, _ in model.named_modules()
        if name not in begun and name.rpartition(".")[0] in around and name
    )


def _width_at(model: nn.Module, place: Place) -> int:
    """Features or channels at `place`, from one run on a black image."""
    shape = _probe(model, place)
    if len(shape) not in (2, 4):
        raise AttachError(
            f"where: {', '.join(place.outputs or place.inputs)} gives {shape}, "
            "wanted vectors (n, d) or maps (n, d, h, w)"
        )
    return shape[1 if len(shape) == 2 else channel_axis(shape)]


def maps_at(model: nn.Module, place: Place) -> tuple[int, str, int]:
    """Channels, layout and side of the maps at `place`: those of a square image are square."""
    shape = _probe(model, place)
    if len(shape) == 4 and shape[2] in (shape[1], shape[3]):
        axis = channel_axis(shape)
        return shape[axis], {1: "nchw", 3: "nhwc"}[axis], shape[2]
    raise AttachError(
        f"at: {', '.join(place.outputs)} gives {shape}, wanted maps (n, c, h, w) or (n, h, w, c)"
    )


class ProbeError(AttachError):
    """The model does not run on an image of the shape that it seems to take."""


def probe_image(model: nn.Module) -> Tensor:
    """A black image `(1, c, h, w)` as the model says that it takes them."""
    host, sides = host_of(model), said_sides(model)
    if sides is None:
        sides = (INPUT_SIZE if host is None else host.input_size(model),) * 2
    return black_image(model, *sides)


def _probe(model: nn.Module, place: Place) -> tuple[int, ...]:
    """Shape of the feature at `place`, from one run on a black image."""
    image = probe_image(model)
    try:
        with frozen(model):
            feature = take_feature(model, place, image)
    except AttachError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise _does_not_run(image, error, f"the width at {place.name!r} has to be given") from error
    return tuple(feature.shape)


def _does_not_run(image: Tensor, error: Exception, so: str) -> ProbeError:
    shape = " x ".join(map(str, image.shape[1:]))
    return ProbeError(
        f"in_features: the model does not run on an image of {shape} "
        f"({type(error).__name__}: {error}), so {so}"
    )


def attached_runs(
    model: nn.Module, batch: Any, *, run: Callable[[Any], Any] | None = None
) -> dict[str, bool]:
    """By place, whether what the model returns for `batch` hangs on what is attached there.

    What reaches a place is disturbed, one place after the other, and the results are compared. It
    is False where what is attached is not called, as in a model that the host has fused, rebuilt
    or copied since, or where its result is not used. Of a torchvision detector all that its heads
    say is compared, before boxes are left out for their scores.

    Args:
        model: with something attached to it, or to a module in it; as it is used: compiled, say.
        batch: what it takes.
        run: how it is used, if not as `model(batch)`: a predictor around the model, for one. It
            has to run in this thread.

    Raises:
        AttachError: nothing is attached.
        ValueError: a result without numbers, or another one each time.
    """
    hosts = {n: m for n, m in model.named_modules() if isinstance(m, Transfers) and len(m)}
    if not hosts:
        transfers_of(model)
    detector = detector_host(model)
    if run is None:  # `or` would ask a compiled model for its length
        run = model if detector is None else partial(detector.answers, model)
    with frozen(model):
        plain = _numbers(run(batch))
        if not any(value.numel() for value in plain):
            raise ValueError("batch: the model's result for it has no numbers, wanted some")
        if not _are_equal(plain, _numbers(run(batch))):
            raise ValueError("batch: the model gives another result for it each time")
        return {
            place if len(hosts) == 1 else f"{name.removesuffix(CHILD)}{place}": _hangs_on(
                transfers, place, plain, partial(run, batch)
            )
            for name, transfers in hosts.items()
            for place in transfers
        }


def _hangs_on(
    transfers: Transfers, place: str, plain: Sequence[Tensor], run: Callable[[], Any]
) -> bool:
    with disturbed(transfers, place):
        return not _are_equal(plain, _numbers(run()))


def _numbers(value: Any, depth: int = 6) -> list[Tensor]:
    """The numbers in whatever a model returns; objects may hold each other, so not for ever."""
    if isinstance(value, int | float | np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        return [value.detach().double().nan_to_num().cpu()]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        value = list(vars(value).values())
    if not isinstance(value, list | tuple) or not depth:
        return []
    return [tensor for part in value for tensor in _numbers(part, depth - 1)]


def _are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


class _Nothing(TransferModule):
    """What returns its input."""

    kind = "nothing"

    def forward(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features


def _watch(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Any]:
    """The result, and what reaches some modules."""
    seen: list[Any] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args))
        for name in names
    ]
    try:
        return [model(images), *seen]
    finally:
        for handle in handles:
            handle.remove()


def prove(model: nn.Module, places: Sequence[Place], image: Tensor) -> None:
    """Attaches something at each place, sees by one image that it acts, and takes it away again.

    Args:
        model: the host; it is as it was after, whatever happens.
        places: where something is or will be attached.
        image: `(1, c, h, w)` in the host's dtype, on its device.

    Raises:
        AttachError: what is attached at a place changes nothing, or the model does not run.
    """
    watched = [  # a new classifier may be of zeros, and its result the same whatever reaches it
        name
        for name, module in model.named_modules()
        if any(p.ndim > 1 and not p.any() for p in module.parameters(recurse=False))
    ]
    detector = detector_host(model)
    if detector is not None:  # of an image without boxes nothing can be told of their heads
        with frozen(model):
            places = [p for p in places if p.block or take_feature(model, p, image).numel()]
    added = [place for place in places if attached_at(model, place) is None]
    try:
        for place in added:
            install(model, place, _Nothing())
        run = partial(_watch, model, watched) if detector is None else None
        try:
            acts = attached_runs(model, image, run=run) if places else {}
        except (AttachError, ValueError):
            raise
        except Exception as error:  # whatever a foreign model raises
            raise _does_not_run(image, error, "nothing can be trained in it") from error
        idle = [place.name for place in places if not acts[place.name]]
    finally:
        for place in added:
            if attached_at(model, place) is not None:
                uninstall(model, place)
    if idle:
        raise AttachError(
            f"model: what is attached at {', '.join(map(repr, idle))} changes nothing that "
            f"{type(model).__name__} returns: it is not called, or its result is not used"
        )


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


def _warn_of_blocks(model: nn.Module, module: TransferModule) -> None:
    """Warns where a head was trained on what comes through blocks that are not attached."""
    after = [] if module.card is None else module.card.details.get("after", [])
    missing = [name for name in after if not is_attached(model) or name not in transfers_of(model)]
    if missing:
        warnings.warn(
            f"head: it was trained behind blocks at {', '.join(missing)}, which are not attached",
            stacklevel=4,
        )


def _warn_of_degradation(module: TransferModule, degradation: BaseDegradation | None) -> None:
    if module.card is None or not module.card.degradations:
        return
    if degradation in (None, *module.card.degradations):
        return
    trained = ", ".join(d.to_json() for d in module.card.degradations)
    warnings.warn(
        f"degradation: the {module.kind} was trained on {trained}, "
        f"the images are {degradation.to_json() if degradation else None}",
        stacklevel=4,
    )
