"""The rows of the table: each makes LR features better, and says what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gap.features import through_blocks
from benchmarks.gap.study import Rows, Study, small, subset
from benchmarks.voc2007.methods import ridge
from featxfer import (
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    Images,
)
from featxfer_integrations import TransferFit, attach_transfer, fit_transfer, transfers_of
from featxfer_integrations.attach import maps_at

Found = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A row or several of the table.

    Args:
        labels: of the rows that it gives.
        seeded: whether the seed changes them.
        run: (study, LR views, seed) -> the figures of each row.
    """

    labels: tuple[str, ...]
    seeded: bool
    run: Callable[[Study, Sequence[Degradation], int], list[Found]]


def plain(study: Study, views: Sequence[Degradation], seed: int) -> list[Found]:
    """HR, LR, and the average of LR features over the image and its mirror image."""
    train, test = (study.features(split, views[0]) for split in ("trainval", "test"))
    rows, tested = (
        through_blocks(study, study.model, split, views[0]) for split in ("trainval", "test")
    )
    return [
        study.judge(Rows(train.hr, test.hr, test.hr)),
        study.judge(Rows(train.lr, test.lr, test.hr)),
        study.judge(Rows(rows.averaged, tested.averaged)),
    ]


def closed_form(study: Study, views: Sequence[Degradation], seed: int) -> list[Found]:
    """Ridge regression of HR features on LR ones."""
    train, test = (study.features(split, views[0]) for split in ("trainval", "test"))
    start = time.perf_counter()
    mapped, both = ridge((train.lr, torch.cat([test.lr, test.hr])), train.hr)
    lr, hr = both.split(len(test.lr))
    took = time.perf_counter() - start
    return [{**study.judge(Rows(mapped, lr, hr)), "seconds": took, "parameters": _square(train.hr)}]


def _square(rows: Tensor) -> int:
    return rows.shape[1] * (rows.shape[1] + 1)


def pooled(**options: Any) -> Callable[[Study, Sequence[Degradation], int], list[Found]]:
    """A head after pool5 that `fit_transfer` trains with these options."""

    def run(study: Study, views: Sequence[Degradation], seed: int) -> list[Found]:
        return [fit_pooled(study, views, seed, study.images("trainval"), **options)]

    return run


def fit_pooled(
    study: Study, views: Sequence[Degradation], seed: int, images: Images, **options: Any
) -> Found:
    """Figures of a head that was trained on these images, judged in the first view."""
    head, fit = fit_pooled_head(study, views, seed, images, **options)
    return {**judge_head(study, head, views[0]), **costs([head], fit.log), **report(fit)}


def fit_pooled_head(
    study: Study, views: Sequence[Degradation], seed: int, images: Images, **options: Any
) -> tuple[FeatureTransferHead, TransferFit]:
    """A head that `fit_transfer` trained on these images, and its report."""
    model = study.copy()
    if options.pop("paper", False):
        width, k = study.hr[0].shape[1], min(100, len(images) // 3)
        attach_transfer(model, FeatureTransferHead(width, k, output="clusters"))
    fit = fit_transfer(
        model, images, degradation=views, depth="pooled", cache=study.cache, seed=seed, **options
    )
    head = transfers_of(model)["pooled"]
    assert isinstance(head, FeatureTransferHead)
    return head, fit


def judge_head(study: Study, head: FeatureTransferHead, view: Degradation) -> Found:
    """Figures of a head on plain features."""
    train, test = (study.features(split, view) for split in ("trainval", "test"))
    hr = head.transfer(test.hr) if head.output == "features" else None
    return study.judge(Rows(head.transfer(train.lr), head.transfer(test.lr), hr))


def several(study: Study, views: Sequence[Degradation], seed: int) -> list[Found]:
    """Prototypes of 100, 25 and 400 clusters at once; of no more than a third of the images."""
    images = study.images("trainval")
    clusters = [min(k, len(images) // 3) for k in (100, 25, 400)]
    return [fit_pooled(study, views, seed, images, clusters=clusters)]


def half(**options: Any) -> Callable[[Study, Sequence[Degradation], int], list[Found]]:
    """HR images are one half of the images; LR ones, if asked for, the other half."""

    def run(study: Study, views: Sequence[Degradation], seed: int) -> list[Found]:
        images = study.images("trainval")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
        cut = len(order) // 2
        ours, others = subset(images, sorted(order[:cut])), subset(images, sorted(order[cut:]))
        given = dict(options)
        if "unpaired" in given:
            given["lr_images"] = small(others, views[0].lr_size)
        return [fit_pooled(study, views, seed, ours, **given)]

    return run


def deep(study: Study, views: Sequence[Degradation], seed: int) -> list[Found]:
    """Blocks alone, with the head on top, and that averaged over flips, and over shifts too."""
    model = attach_transfer(study.copy())
    fit = fit_transfer(
        model,
        study.images("trainval"),
        degradation=views,
        depth="deep",
        cache=study.cache,
        seed=seed,
    )
    return judge_model(study, model, views[0], fit)


def judge_model(study: Study, model: nn.Module, view: Degradation, fit: TransferFit) -> list[Found]:
    """Figures of blocks, of all that is attached, and of its averages over flips and shifts."""
    transfers = transfers_of(model)
    head = transfers["pooled"]
    blocks = [module for name, module in transfers.items() if name != "pooled"]
    assert isinstance(head, FeatureTransferHead)
    train = through_blocks(study, model, "trainval", view)
    test = through_blocks(study, model, "test", view, shifts=True)
    six = [head.transfer(rows) for rows in (test.lr, test.lr_flipped, *test.lr_shifted)]
    found = []
    for rows in (
        Rows(train.lr, test.lr, test.hr),
        Rows(head.transfer(train.lr), head.transfer(test.lr), head.transfer(test.hr)),
        Rows(
            (head.transfer(train.lr) + head.transfer(train.lr_flipped)) / 2,
            (head.transfer(test.lr) + head.transfer(test.lr_flipped)) / 2,
            (head.transfer(test.hr) + head.transfer(test.hr_flipped)) / 2,
        ),
        Rows(None, torch.stack(six).mean(0)),
    ):
        found.append(study.judge(rows))
    macs, logs = block_macs(model), (*fit.blocks_log, *fit.log)
    found[0] |= macs | costs(blocks, fit.blocks_log)
    for row in found[1:]:
        row |= macs | costs([*blocks, head], logs)
    found[1] |= report(fit)  # the others are not what was held out for
    return found


def block_macs(model: nn.Module) -> Found:
    """Millions of multiply-accumulates of the attached blocks, for one image."""
    transfers, total = transfers_of(model), 0
    for name, place in transfers.places.items():
        block = transfers[name]
        if isinstance(block, FeatureTransferBlock):
            side = maps_at(model, place)[2]
            total += block.macs(side, side)
    return {"block_macs": total / 1e6}


def costs(modules: Sequence[Any], log: Sequence[Any]) -> Found:
    """Seconds of training, and parameters."""
    return {
        "seconds": sum(entry.seconds for entry in log),
        "parameters": sum(p.numel() for m in modules for p in m.parameters()),
    }


def report(fit: TransferFit) -> Found:
    """What the fit itself says of all that it trained, without labels."""
    return {
        "self_check": [
            {
                "cosine_gap": part.cosine_gap_recovered,
                "cosine": part.after.cosine,
                "retrieval": part.after.retrieval,
                "clusters": part.after.clusters,
                "retrieval_gap": _share(part.before.retrieval, part.after.retrieval),
                "clusters_gap": _share(part.before.clusters, part.after.clusters),
                "hr_cosine": part.hr_cosine,
            }
            for part in fit.held_out
        ],
    }


def _share(before: float, after: float) -> float:
    """Of what is missing to 1, how much is gained."""
    return (after - before) / (1 - before) if before < 1 else 0.0


METHODS: Mapping[str, Method] = {
    "plain": Method(("HR", "LR", "LR, flips averaged"), False, plain),
    "ridge": Method(("ridge regression",), False, closed_form),
    "paper": Method(("the paper's head (nearest labels)",), True, pooled(paper=True)),
    "labels": Method(("head: cross-entropy on paired labels",), True, pooled(objective="labels")),
    "regression": Method(("head: regression",), True, pooled(objective="regression")),
    "contrast": Method(("head: instance contrast",), True, pooled(objective="contrast")),
    "prototypes": Method(("head: prototypes (default)",), True, pooled()),
    "several": Method(("head: three clusterings",), True, several),
    "warm": Method(("head: warm start by ridge",), True, pooled(warm_start=True)),
    "half": Method(("head, half of the images, pairs",), True, half()),
    "moments": Method(("head, two halves, moments",), True, half(unpaired="moments")),
    "transport": Method(("head, two halves, transport",), True, half(unpaired="transport")),
    "deep": Method(
        (
            "deep: blocks",
            "deep: blocks and head",
            "deep, flips averaged",
            "deep, flips and shifts averaged",
        ),
        True,
        deep,
    ),
}
"""Methods by the name that `--methods` takes."""
