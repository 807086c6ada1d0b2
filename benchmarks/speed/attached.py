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

from benchmarks.speed.pairs import Way, time_pairs
from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import attach_transfer, detach_transfer, transfers_of
from featxfer_integrations._attach import is_attached
from featxfer_integrations.attach import find_place
from featxfer_integrations.deep import new_blocks, plan_blocks

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
    for name in models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(device, memory_format=torch.channels_last)
        for batch in batches:
            images = torch.randn(batch, 3, 224, 224, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            for hidden, dtype in HEADS:
                yield {
                    "model": name,
                    "batch": batch,
                    "hidden": hidden,
                    "dtype": str(dtype).removeprefix("torch."),
                    **_compare(f"{name}, batch {batch}", model, images, hidden, dtype, seconds),
                }


def measure_blocks(
    models: Sequence[str], batches: Sequence[int], seconds: float, device: str
) -> Iterator[dict[str, Any]]:
    """The same for the blocks that `fit_transfer(depth="deep")` attaches."""
    for name in models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(device, memory_format=torch.channels_last)
        plans = plan_blocks(model, find_place(model), "deep", None, None)
        blocks = new_blocks(model, plans, 0)
        for batch in batches:
            images = torch.randn(batch, 3, 224, 224, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            with FlopCounterMode(display=False) as counter, torch.inference_mode():
                model(images[:1])
            yield {
                "model": name,
                "batch": batch,
                "after": [plan.module for plan in plans],
                "hidden": next(iter(blocks.values())).hidden_channels,
                "parameters": sum(p.numel() for b in blocks.values() for p in b.parameters()),
                "macs": sum(blocks[plan.module].macs(plan.side, plan.side) for plan in plans),
                "model_macs": counter.get_total_flops() // 2,
                **_time(
                    f"{name}, batch {batch}",
                    model,
                    images,
                    partial(_attach_all, model, blocks),
                    seconds,
                ),
            }


def _attach_all(model: nn.Module, blocks: Mapping[str, FeatureTransferBlock]) -> None:
    for module, block in blocks.items():
        attach_transfer(model, block, at=module)


def _compare(
    name: str, model: nn.Module, images: Tensor, hidden: int, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    attach_transfer(model, hidden_features=hidden)
    head = transfers_of(model)["pooled"]
    assert isinstance(head, FeatureTransferHead)
    detach_transfer(model)
    nn.init.normal_(head.fc2.weight, std=0.01)

    def attach() -> None:
        attach_transfer(model, head, dtype=dtype)

    result = _time(name, model, images, attach, seconds)
    return {**result, "head_ms": _time_head(head, len(images))}


def _time(
    name: str, model: nn.Module, images: Tensor, put: Callable[[], None], seconds: float
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
        return time_pairs(name, plain, Way(attach, run), pairs)
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


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row."""
    lines = [
        "| model | batch | hidden | weights | plain ms | attached ms | ratio | quartiles | pairs "
        "| head alone ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['hidden']} | {row['dtype']} "
            f"| {row['first_ms']:.1f} | {row['second_ms']:.1f} | {row['ratio']:.4f} "
            f"| {low:.4f} to {high:.4f} | {row['pairs']} | {row['head_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def blocks_to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row of `measure_blocks`."""
    lines = [
        "| model | batch | after | hidden | parameters | arithmetic | plain ms | attached ms "
        "| ratio | quartiles | pairs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['model']} | {row['batch']} | {', '.join(row['after'])} | {row['hidden']} "
            f"| {row['parameters']:,} | {row['macs'] / row['model_macs']:.1%} "
            f"| {row['first_ms']:.1f} | {row['second_ms']:.1f} | {row['ratio']:.3f} "
            f"| {low:.3f} to {high:.3f} | {row['pairs']} |"
        )
    return "\n".join(lines) + "\n"
