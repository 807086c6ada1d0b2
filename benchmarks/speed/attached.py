"""Latency of a model with a head attached against the same model without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.fit import head_of
from benchmarks.common.markdown import Column, entry, to_markdown
from benchmarks.speed.pairs import Way, quartiles, time_pairs
from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import attach_transfer, detach_transfer, host_of
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.mechanism.attach import is_attached
from featxfer_integrations.stages.blocks import block_width

MODELS = ("resnet101", "resnet18", "tf_efficientnet_lite0")
HEADS = (
    (4096, torch.float32),
    (512, torch.float32),
    (512, torch.bfloat16),
    (128, torch.float32),
)
"""Hidden features and dtype of the weights."""


def measure(
    models: Sequence[str], batches: Sequence[int], seconds: float, device: str
) -> Iterator[dict[str, Any]]:
    """A row a model, batch size and head: milliseconds plain, attached, of the head; the ratio.

    Weights are random (they do not change the time), images are of 224 x 224, channels last. Each
    row takes as many pairs as fit into about `seconds`, at least 7.
    """
    for name, model, images in _with_images(models, batches, device):
        for hidden, dtype in HEADS:
            attach_transfer(model, hidden_features=hidden)
            head = head_of(model)
            detach_transfer(model)
            nn.init.normal_(head.fc2.weight, std=0.01)
            attach = partial(attach_transfer, model, head, dtype=dtype)
            yield {
                "model": name,
                "batch": len(images),
                "hidden": hidden,
                "dtype": str(dtype).removeprefix("torch."),
                **_time(name, model, images, attach, seconds),
                "head_ms": _time_head(head, len(images)),
            }


def _with_images(
    models: Sequence[str], batches: Sequence[int], device: str
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    for name in models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(device, memory_format=torch.channels_last)
        for batch in batches:
            images = torch.randn(batch, 3, 224, 224, device=device)
            yield name, model, images.contiguous(memory_format=torch.channels_last)


def measure_blocks(
    models: Sequence[str], batches: Sequence[int], seconds: float, device: str
) -> Iterator[dict[str, Any]]:
    """The same for the blocks that `fit_transfer(site="blocks")` attaches."""
    for name, model, images in _with_images(models, batches, device):
        host = host_of(model)
        sites = find_sites(host, model, "blocks")
        width = block_width(host, model, sites, None)
        blocks = {s.asked: FeatureTransferBlock(hidden_channels=width, **s.sizes) for s in sites}
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(images[:1])
        yield {
            "model": name,
            "batch": len(images),
            "after": list(blocks),
            "hidden": width,
            "parameters": sum(p.numel() for b in blocks.values() for p in b.parameters()),
            "macs": sum(blocks[s.asked].macs(*(s.extent or (1, 1))) for s in sites),
            "model_macs": counter.get_total_flops() // 2,
            **_time(name, model, images, partial(_attach_all, model, blocks), seconds),
        }


def _attach_all(model: nn.Module, blocks: Mapping[str, FeatureTransferBlock]) -> None:
    for name, block in blocks.items():
        attach_transfer(model, block, site=name)


def _time(
    name: str, model: nn.Module, images: Tensor, put: Callable[[], object], seconds: float
) -> dict[str, Any]:
    """The plain model against the same with what `put` attaches, in turns."""

    @torch.inference_mode()
    def run() -> None:
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    def attach() -> None:
        if not is_attached(model):
            put()
            warm_up()

    def detach() -> None:
        if is_attached(model):
            detach_transfer(model)
            warm_up()

    def warm_up() -> None:
        """A short run feels that the caches were last used for attaching; a long one does not."""
        if len(images) == 1:
            run()

    plain = Way(detach, run)
    pairs = max(7, round(seconds / (2 * min(plain.seconds() for _ in range(2)))))
    try:
        return time_pairs(f"{name}, batch {len(images)}", plain, Way(attach, run), pairs)
    finally:
        detach()


@torch.inference_mode()
def _time_head(head: FeatureTransferHead, batch: int) -> float:
    """Median milliseconds of 200 runs of the head alone, right after each other."""
    features = torch.randn(batch, head.in_features, device=head.fc1.weight.device)

    def run() -> None:
        head(features)
        if features.is_cuda:
            torch.cuda.synchronize()

    way = Way(lambda: None, run)
    return 1000 * float(np.median([way.seconds() for _ in range(200)]))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row."""
    of_heads = [entry("hidden", "hidden"), entry("weights", "dtype")]
    return to_markdown(
        rows, [*_MODEL, *of_heads, *_timed(".4f"), entry("head alone ms", "head_ms", ".2f")]
    )


def blocks_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row of `measure_blocks`."""
    of_blocks: list[Column[Any]] = [
        ("after", lambda row: ", ".join(row["after"])),
        entry("hidden", "hidden"),
        entry("parameters", "parameters", ","),
        ("arithmetic", lambda row: f"{row['macs'] / row['model_macs']:.1%}"),
    ]
    return to_markdown(rows, [*_MODEL, *of_blocks, *_timed(".3f")])


_MODEL = (entry("model", "model"), entry("batch", "batch"))


def _timed(form: str) -> list[Column[Any]]:
    times = [entry("plain ms", "first_ms", ".1f"), entry("attached ms", "second_ms", ".1f")]
    return [*times, entry("ratio", "ratio", form), quartiles(form), entry("pairs", "pairs")]
