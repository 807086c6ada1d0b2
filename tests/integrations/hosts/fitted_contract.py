"""What blocks promise of any host's model: from attaching, through a fit, to loading."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from featxfer import BaseDegradation, Preprocessing
from featxfer_integrations import (
    FitOptions,
    attach_transfer,
    attached_runs,
    detach_transfer,
    fit_transfer,
    host_of,
    load_transfers,
    save_transfers,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.mechanism.proof import are_equal, numbers_of
from tests.integrations.fitting import QUICK, assert_untouched, state_of
from tests.integrations.hosts.contract import attributes, hooks
from tests.integrations.models import randomise_all


@dataclass(frozen=True)
class Case:
    """A model, how it is used, and views that it is fitted on.

    Args:
        make: the model, small, in eval mode, with random weights that are the same each time.
        run: (model, batch) -> all that it says of a batch.
        batches: as the model takes them: several, one alone, odd sizes where it takes them.
        view: of the images that it is fitted on; with the model's own size.
        preprocessing: of these, where the host would not know.
        site: as `attach_transfer` takes it.
        targets: as `fit_transfer` takes them.
    """

    make: Callable[[], nn.Module]
    run: Callable[[Any, Any], Any]
    batches: Sequence[Tensor]
    view: BaseDegradation
    preprocessing: Preprocessing | None = None
    site: str = "blocks"
    targets: Sequence[str] | None = None

    @torch.no_grad()
    def said(self, model: nn.Module) -> list[Tensor]:
        """All numbers of all batches."""
        return [part for batch in self.batches for part in numbers_of(self.run(model, batch))]


def check_attached(case: Case) -> None:
    """The identity bit for bit until trained, what is attached acts, and it leaves no trace."""
    model = case.make()
    plain, state, own = case.said(model), state_of(model), (attributes(model), hooks(model))
    assert plain
    assert all(part.isfinite().all() for part in plain)
    attach_transfer(model, site=case.site, hidden_features=16)
    assert are_equal(case.said(model), plain)
    randomise_all(model)
    changed = case.said(model)
    assert not are_equal(changed, plain)
    assert all(
        attached_runs(model, case.batches[0], run=lambda batch: case.run(model, batch)).values()
    )
    with transfer_disabled(model):
        assert are_equal(case.said(model), plain)
    model.load_state_dict(state, strict=True)
    copied = copy.deepcopy(model)
    assert are_equal(case.said(copied), changed)
    assert transfers_of(copied) is not transfers_of(model)
    half = copied.bfloat16()
    with torch.no_grad():
        low = numbers_of(case.run(half, case.batches[0].bfloat16()))
        with transfer_disabled(half):
            assert not are_equal(low, numbers_of(case.run(half, case.batches[0].bfloat16())))
    detach_transfer(model)
    assert_untouched(model, state)
    assert (attributes(model), hooks(model)) == own
    assert are_equal(case.said(model), plain)


def draw_textures(folder: Path, count: int = 24, side: int = 64) -> list[Path]:
    """Images of coloured blobs with one fine texture, which LR images lose: soon learned."""
    rng, files = np.random.default_rng(0), []
    texture = 60 * (np.indices((side, side, 1)).sum(0) % 4 // 2 * 2 - 1)
    for index in range(count):
        blobs = Image.fromarray(rng.integers(60, 196, (4, 4, 3), dtype=np.uint8))
        pixels = np.asarray(blobs.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        files.append(folder / f"{index:02d}.png")
        Image.fromarray(np.clip(pixels + texture, 0, 255).astype(np.uint8)).save(files[-1])
    return files


def check_fitted(case: Case, folder: Path, images: Any = None, **options: Any) -> None:
    """A fit on 24 images brings held-out LR images nearer, and is saved and loaded whole."""
    model = case.make()
    if images is None:
        images = draw_textures(folder, side=getattr(case.view, "hr_size", 64))
    state = state_of(model)
    recipe = dataclasses.replace(QUICK, epochs=12, batch_size=6, learning_rate=5e-3)
    usual = FitOptions(
        block_recipe=recipe,
        held_out=0.25,
        precision="fp32",
        crops=None if host_of(model).detects else 0,
        preprocessing=case.preprocessing,
    )
    fit = fit_transfer(
        model,
        images,
        degradation=case.view,
        site=case.site,
        targets=case.targets,
        options=dataclasses.replace(usual, **options),
        cache=folder / "cache",
    )
    assert fit.held_out[0].after.cosine > fit.held_out[0].before.cosine
    with transfer_disabled(model):
        assert are_equal(case.said(model), case.said(case.make()))
    loaded = load_transfers(case.make(), save_transfers(model, folder / "saved"))
    assert are_equal(case.said(loaded), case.said(model))
    assert not are_equal(case.said(loaded), case.said(case.make()))
    assert_untouched(detach_transfer(model), state)
