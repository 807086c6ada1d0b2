from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from click.testing import CliRunner
from torch import nn

from benchmarks.attach import __main__ as attach

FOLDER = Path(attach.__file__).parent


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("make", "verdict"),
    [
        (timm.create_model, "attached"),
        (lambda _: Headless(), "refused: site: wanted the name of a module"),
        (lambda _: 1 / 0, "refused: the model cannot be made: division by zero"),
    ],
)
def test_verdicts(make: Callable[[str], nn.Module], verdict: str) -> None:
    assert attach.attempt(make, "test_resnet").startswith(verdict)


def test_a_model_that_does_not_run_is_not_counted_as_checked() -> None:
    def make(name: str) -> nn.Module:
        model: nn.Module = timm.create_model(name)
        model.conv1 = nn.Conv2d(7, 7, 3)
        return model

    assert attach.attempt(make, "test_resnet").startswith("attached, not run: RuntimeError")


def test_the_summary_counts_verdicts_and_reasons() -> None:
    verdicts = {"a": "attached", "b": "refused: x", "c": "refused: x", "d": "attached"}
    assert attach.summary({"lib": verdicts}) == [
        "lib: 4 models: 2 attached, 2 refused",
        "     2 refused: x",
    ]


def test_the_command_writes_what_it_says(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    result = CliRunner().invoke(attach.main, ["--only", "test_resnet", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "timm: 1 models: 1 attached" in result.output
    assert json.loads(out.read_text())["timm"] == {"test_resnet": "attached"}


def test_the_readmes_counts_are_those_of_the_committed_results() -> None:
    results = json.loads((FOLDER / "results.json").read_text())
    lines = attach.summary({name: results[name] for name in ("timm", "torchvision")})
    assert "\n".join(lines) in (FOLDER / "README.md").read_text()
    attached = [verdict for verdict in results["timm"].values() if verdict == "attached"]
    readme = (FOLDER.parents[1] / "README.md").read_text()
    assert f"{len(attached):,} of timm's {len(results['timm']):,}" in readme
    assert f"all {len(results['torchvision'])} of torchvision's" in readme
    assert set(results["torchvision"].values()) == {"attached"}
