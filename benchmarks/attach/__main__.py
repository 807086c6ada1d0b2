"""`python -m benchmarks.attach`: every model of timm and torchvision, by shape alone.

Models are made and run on the meta device, which computes shapes and no values: no weights, no
arithmetic. Of each it is checked that a head attaches, that logits and (timm) pre-logits features
go through it in its width, and that detaching leaves the model's state dict as it was.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import timm
import torch
import torchvision
import torchvision.models
from torch import nn
from tqdm import tqdm

from benchmarks.common.fit import head_of
from benchmarks.common.shell import told_errors
from benchmarks.common.versions import versions
from featxfer.files import write_atomic
from featxfer_integrations import AttachError, attach_transfer, detach_transfer, host_of

ATTACHED, NOT_RUN, REFUSED = "attached", "attached, not run", "refused"


@click.command(context_settings={"show_default": True})
@click.option("--only", default="", help="Names that contain this.")
@click.option("--out", type=Path, default=Path("runs") / "attach" / "results.json")
def main(only: str, out: Path) -> None:
    """Counts the models that a head can be attached to, and says why not of the others."""
    warnings.filterwarnings("ignore")
    with told_errors():
        results = {
            "timm": survey(timm.list_models(f"*{only}*"), timm.create_model),
            "torchvision": survey(
                torchvision.models.list_models(
                    module=torchvision.models, include=f"*{only}*" if only else None
                ),
                torchvision.models.get_model,
            ),
        }
        text = json.dumps({"versions": versions(), **results}, indent=1, sort_keys=True) + "\n"
        write_atomic(out, text.encode())
        for line in summary(results):
            click.echo(line)
        click.echo(f"Wrote {out}")


def survey(names: Iterable[str], make: Any) -> dict[str, str]:
    """Of each model "attached", or "attached, not run" or "refused" with the reason."""
    return {name: attempt(make, name) for name in tqdm(list(names), unit="model", disable=None)}


def attempt(make: Any, name: str) -> str:
    """What attaching to one model comes to."""
    try:
        model = _make(make, name).eval()
    except Exception as error:  # whatever a model needs that is not installed here
        return f"{REFUSED}: the model cannot be made: {_first_line(error)}"
    before = list(model.state_dict())
    try:
        attach_transfer(model)
    except AttachError as error:
        return f"{REFUSED}: {_first_line(error)}"
    verdict = _run(model)
    if list(detach_transfer(model).state_dict()) != before:
        raise AssertionError(f"{name}: detaching changed the state dict")
    return verdict


def _make(make: Any, name: str) -> nn.Module:
    """The model without memory for its weights; with, where its constructor reads values."""
    try:
        with torch.device("meta"):
            made: nn.Module = make(name)
    except (NotImplementedError, RuntimeError):
        made = make(name).to("meta")
    return made


def _run(model: Any) -> str:
    head = head_of(model)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    images = host_of(model).image(model).expand(2, -1, -1, -1)
    try:
        with torch.no_grad():
            model(images)
            logits_calls = len(calls)
            if hasattr(model, "forward_head"):
                feature = model.forward_head(model.forward_features(images), pre_logits=True)
                if feature.shape != (2, head.out_features):
                    return f"{REFUSED}: pre-logits features are {tuple(feature.shape)}"
    except Exception as error:  # whatever a foreign model raises
        return f"{NOT_RUN}: {type(error).__name__}: {_first_line(error)}"
    if not logits_calls or (hasattr(model, "forward_head") and len(calls) != logits_calls + 1):
        return f"{REFUSED}: the head is not passed"
    return ATTACHED


def summary(results: dict[str, dict[str, str]]) -> list[str]:
    """Counts by library, and reasons with how many models have them."""
    lines = []
    for library, verdicts in results.items():
        counts = Counter(verdict.split(":")[0] for verdict in verdicts.values())
        said = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        lines.append(f"{library}: {len(verdicts)} models: {said}")
        reasons = Counter(verdict for verdict in verdicts.values() if verdict != ATTACHED)
        lines += [f"  {count:4d} {reason}" for reason, count in reasons.most_common()]
    return lines


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]


if __name__ == "__main__":
    main()
