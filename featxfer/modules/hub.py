"""TransferModule: what a head and a block share, among it saving, loading and the model hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

if TYPE_CHECKING:
    from featxfer.modules.artifact import Card

T = TypeVar("T", bound="TransferModule")

LARGEST_Z = 50.0
"""Standard deviations from the mean beyond which inputs count as so far away.

Of n features none is further than sqrt(n - 1) from their mean; those of photographs were within 27
at every stage of EfficientNet-Lite0, other data sets' too. What later layers make of it is within
float16.
"""

SMALLEST_SHARE = 1e-3
"""Of a channel's standard deviation: this share of the median of those channels that vary."""


class TransferModule(nn.Module, PyTorchModelHubMixin):
    """A module that keeps the shape or the meaning of features, with a card that says for what.

    Its buffers are float32 or wider whatever dtype its weights are converted to: a mean of 1e5 is
    infinity in float16, and a standard deviation of 1e-9 is 0.

    Attributes:
        card: what it was trained on and for; None until it is trained or loaded.
    """

    kind: ClassVar[str]
    input_mean: Tensor
    input_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.card: Card | None = None

    @property
    def in_features(self) -> int:
        """Width or channels of what it takes."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a module of the same shape, as JSON types."""
        raise NotImplementedError

    def normalise(self, features: Tensor) -> Tensor:
        """`(features - input_mean) / input_std` within +-`LARGEST_Z`, in float32 or wider."""
        centred = features - self.input_mean  # the wider of the dtypes, and new memory
        return centred.div_(self.input_std).clamp_(-LARGEST_Z, LARGEST_Z)

    def _keep_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Takes them as the input's; what does not vary gets the standard deviation 1.

        What hardly varies gets `SMALLEST_SHARE` of the median standard deviation.
        """
        constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
        if not constant.all():
            std = std.clamp(min=SMALLEST_SHARE * float(std[~constant].median()))
        self.input_mean.copy_(mean)
        self.input_std.copy_(std.masked_fill(constant, 1.0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransferModule:
        """What moves and converts modules; buffers are moved, and not made narrower."""
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in buffers.items():
            after = self.get_buffer(name)
            if after.dtype.itemsize < before.dtype.itemsize:
                setattr(self, name, before.to(after.device, torch.float32))
        return self

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes weights, card and README into a folder; see `featxfer.save_head`.

        Args:
            save_directory: made if need be.
            config: of the mixin; the config is the module's own.
            repo_id: with `push_to_hub`; by default the folder's name.
            push_to_hub: whether to upload as well; returns the commit's address then.
            model_card_kwargs: of the mixin; the README is made from the card.
            **push_to_hub_kwargs: see `push_to_hub`.

        Raises:
            ValueError: it has no card, so nothing says what it is for; a config of one's own.
            TypeError: `repo_id` or arguments of `push_to_hub` without it, or unknown ones.
            DiskError: the disk refuses; what was saved there before is as it was.
        """
        from featxfer.modules.artifact import save_head

        if config is not None or model_card_kwargs is not None:
            raise ValueError("config, model_card_kwargs: wanted None, the card says it all")
        without = [*push_to_hub_kwargs, *(["repo_id"] if repo_id is not None else [])]
        if without and not push_to_hub:
            raise TypeError(f"got {sorted(without)} without push_to_hub=True")
        if self.card is None:
            raise ValueError(
                f"card: this {self.kind} has none; train it with fit_transfer, or set its `card`"
            )
        save_head(self, save_directory, self.card)
        if not push_to_hub:
            return None
        return str(self.push_to_hub(repo_id or Path(save_directory).name, **push_to_hub_kwargs))

    @classmethod
    def from_pretrained(
        cls: type[T], pretrained_model_name_or_path: str | Path, **download: Any
    ) -> T:
        """Reads what `save_pretrained` wrote, on the CPU, in eval mode, with its card.

        Args:
            pretrained_model_name_or_path: a folder, or the id of a repository on the model hub.
            **download: arguments of `huggingface_hub.snapshot_download`: revision, token, ...

        Raises:
            TypeError: arguments of the download with a folder.
            FileNotFoundError: no such folder, or the hub cannot be reached or has none of it.
            ArtifactError: damaged files, or one of another kind.
        """
        from featxfer.modules.artifact import ArtifactError, load_head

        folder = find_files(pretrained_model_name_or_path, **download)
        module, _ = load_head(folder)
        if not isinstance(module, cls):
            raise ArtifactError(f"{folder}: holds a {module.kind}, wanted a {cls.__name__}")
        return module


def he_initialise(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """He initialisation from a generator on the CPU, on whatever device the layer is; zero bias.

    A layer without memory (`meta`) is left as it is.
    """
    if layer.weight.is_meta:
        return
    drawn = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="cpu")
    nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
    with torch.no_grad():
        layer.weight.copy_(drawn)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def find_files(source: str | Path, **download: Any) -> Path:
    """The folder of a saved module: `source` itself, or where the hub's files were put."""
    from featxfer.modules.artifact import CARD, WEIGHTS

    if Path(source).is_dir():
        if download:
            raise TypeError(f"got {sorted(download)} with the folder {str(source)!r}")
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=[WEIGHTS, CARD], **download))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"head: {str(source)!r} is no folder, and the model hub gave none: {error}"
        ) from error
