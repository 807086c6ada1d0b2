"""The rows of the table: each makes LR features better, and says what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.common.fit import Fit, Found, head_of, seconds, self_check
from benchmarks.common.method import Method
from benchmarks.common.ridge import ridge
from benchmarks.common.study import PARTS, Figures, Study, Transferred, subset
from benchmarks.common.table import TableMethod
from benchmarks.gap.controls import Control, of_pairs, without_pairs
from benchmarks.gap.features import through_blocks
from benchmarks.gap.unpaired import UNPAIRED
from featxfer import (
    FEATURES_RECIPE,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    Images,
)
from featxfer_integrations import FitOptions, attach_transfer, host_of, transfers_of
from featxfer_integrations.mechanism.attach import attached_sites


def plain(study: Study, view: Degradation, seed: int) -> list[Figures]:
    """HR, LR, and the average of LR features over the image and its mirror image."""
    train, test = (study.features(part, view) for part in PARTS)
    rows, tested = (through_blocks(study, study.model, part, view, flips=True) for part in PARTS)
    return [
        study.judge(Transferred(train.hr, test.hr, test.hr)),
        study.judge(Transferred(train.lr, test.lr, test.hr)),
        study.judge(Transferred(rows.averaged, tested.averaged)),
    ]


def closed_form(study: Study, view: Degradation, seed: int) -> list[Figures]:
    """Ridge regression of HR features on LR ones."""
    train, test = (study.features(part, view) for part in PARTS)
    start = time.perf_counter()
    mapped, both = ridge((train.lr, torch.cat([test.lr, test.hr])), train.hr)
    lr, hr = both.split(len(test.lr))
    took, width = time.perf_counter() - start, train.hr.shape[1]
    judged = study.judge(Transferred(mapped, lr, hr))
    return [{**judged, "seconds": took, "parameters": width * (width + 1)}]


def judge_head(study: Study, model: nn.Module, view: Degradation, found: Found) -> list[Figures]:
    """Figures of the attached head on plain features."""
    head = head_of(model)
    train, test = (study.features(part, view) for part in PARTS)
    in_place = head.output == "features"
    hr = head.transfer(test.hr) if in_place else None
    rows = Transferred(head.transfer(train.lr), head.transfer(test.lr), hr, in_place)
    judged = study.judge(rows)
    return [{**judged, **costs([head], found.seconds), "self_check": found.self_check}]


def fitted(
    labels: tuple[str, ...],
    fit: Callable[[Study, Degradation, int], Fit],
    judge: Callable[[Study, nn.Module, Degradation, Found], list[Figures]],
) -> TableMethod:
    """What `fit_transfer` trains."""

    def run(study: Study, view: Degradation, seed: int) -> list[Figures]:
        asked = fit(study, view, seed)
        found = asked.run()
        return judge(study, asked.model, view, found)

    return Method(labels, run, choices=lambda *given: fit(*given).key)


def head(label: str, **options: Any) -> TableMethod:
    """A head after pool5 that `fit_transfer` trains with these options."""
    chosen = FitOptions(**options)
    return fitted(
        (label,), lambda study, view, seed: study.fit([view], seed, options=chosen), judge_head
    )


def paper(study: Study, view: Degradation, seed: int) -> Fit:
    """The paper's head."""
    k = min(100, len(study.images("train")) // 3)
    attached = FeatureTransferHead(study.hr[0].shape[1], k, output="clusters")
    return study.fit([view], seed, model=attach_transfer(study.copy(), attached))


def halves(study: Study, seed: int) -> tuple[Images, Images]:
    """The images to train on, in two halves."""
    images = study.images("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = len(order) // 2
    return subset(images, sorted(order[:cut])), subset(images, sorted(order[cut:]))


def control(label: str, train: Callable[[Study, Degradation, int], Control]) -> TableMethod:
    """A head that is trained without `fit_transfer`."""

    def run(study: Study, view: Degradation, seed: int) -> list[Figures]:
        trained = train(study, view, seed)
        found = Found(seconds(trained.log), 0.0, self_check(trained.held_out))
        return judge_head(study, attach_transfer(study.copy(), trained.head), view, found)

    return Method((label,), run, choices=lambda *_: FEATURES_RECIPE.to_dict())


def judge_blocks(study: Study, model: nn.Module, view: Degradation, fit: Found) -> list[Figures]:
    """Figures of the attached blocks."""
    train, test = (through_blocks(study, model, part, view) for part in PARTS)
    judged = study.judge(Transferred(train.lr, test.lr, test.hr))
    took = costs(list(transfers_of(model).values()), fit.blocks_seconds)
    return [{**judged, **block_macs(model), **took, "self_check": fit.self_check}]


def judge_model(study: Study, model: nn.Module, view: Degradation, fit: Found) -> list[Figures]:
    """Figures of blocks, of all that is attached, and of its averages over flips and shifts."""
    head = head_of(model)
    blocks = [module for module in transfers_of(model).values() if module is not head]
    train = through_blocks(study, model, "train", view, flips=True)
    test = through_blocks(study, model, "test", view, flips=True, shifts=True)
    six = [head.transfer(rows) for rows in (test.lr, test.lr_flipped, *test.lr_shifted)]
    found = []
    for rows in (
        Transferred(train.lr, test.lr, test.hr),
        Transferred(head.transfer(train.lr), head.transfer(test.lr), head.transfer(test.hr)),
        Transferred(
            (head.transfer(train.lr) + head.transfer(train.lr_flipped)) / 2,
            (head.transfer(test.lr) + head.transfer(test.lr_flipped)) / 2,
            (head.transfer(test.hr) + head.transfer(test.hr_flipped)) / 2,
        ),
        Transferred(None, torch.stack(six).mean(0)),
    ):
        found.append(study.judge(rows))
    macs, both = block_macs(model), fit.blocks_seconds + fit.seconds
    found[0] |= macs | costs(blocks, fit.blocks_seconds)
    for row in found[1:]:
        row |= macs | costs([*blocks, head], both)
    found[1] |= {"self_check": fit.self_check}  # the others are not what was held out for
    return found


def block_macs(model: nn.Module) -> Figures:
    """Millions of multiply-accumulates of the attached blocks, for one image."""
    transfers, host, total = transfers_of(model), host_of(model), 0
    for site in attached_sites(model):
        block, extent = transfers[site.name], host.measured(model, site).extent
        if isinstance(block, FeatureTransferBlock) and extent is not None:
            total += block.macs(*extent)
    return {"block_macs": total / 1e6}


def costs(modules: Sequence[Any], seconds: float) -> Figures:
    """Seconds of training, and parameters."""
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    return {"seconds": seconds, "parameters": parameters}


METHODS: Mapping[str, TableMethod] = {
    "plain": Method(("HR", "LR", "LR, flips averaged"), plain, seeded=False),
    "ridge": Method(("ridge regression",), closed_form, seeded=False),
    "paper": fitted(("the paper's head (nearest labels)",), paper, judge_head),
    "labels": head("head: cross-entropy on paired labels", objective="labels"),
    "regression": head("head: regression", objective="regression"),
    "contrast": head("head: instance contrast", objective="contrast"),
    "prototypes": head("head: prototypes (default)"),
    "several": control(
        "head: three clusterings", lambda *given: of_pairs(*given, clusters=(100, 25, 400))
    ),
    "warm": control("head: warm start by ridge", lambda *given: of_pairs(*given, warm_start=True)),
    "half": fitted(
        ("head, half of the images, pairs",),
        lambda study, view, seed: study.fit([view], seed, images=halves(study, seed)[0]),
        judge_head,
    ),
    **{
        kind: control(
            f"head, two halves, {kind}",
            lambda study, view, seed, kind=kind: without_pairs(  # type: ignore[misc]
                study, view, seed, halves(study, seed), kind
            ),
        )
        for kind in UNPAIRED
    },
    "deep": fitted(
        (
            "deep: blocks",
            "deep: blocks and head",
            "deep, flips averaged",
            "deep, flips and shifts averaged",
        ),
        lambda study, view, seed: study.fit([view], seed, ["blocks", "head"]),
        judge_model,
    ),
}
"""Methods by the name that `--methods` takes."""

BLOCKS = fitted(
    ("blocks (default)",), lambda study, view, seed: study.fit([view], seed, "blocks"), judge_blocks
)
"""What `fit_transfer` trains unless told, on its own."""
