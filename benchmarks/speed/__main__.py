"""`python -m benchmarks.speed attached`: timings, side by side in one run."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import click
import torch

from benchmarks.shell import told_errors
from benchmarks.speed import attached
from benchmarks.versions import versions
from featxfer._files import write_atomic


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Timings against what a user would do without featxfer: ratios and medians of pairs."""


@main.command("attached")
@click.option("--model", "models", multiple=True, default=attached.MODELS, help="Of timm.")
@click.option("--batch", "batches", multiple=True, default=(1, 32))
@click.option("--seconds", default=60.0, help="About how long a row takes.")
@click.option("--device", default="cpu")
@click.option("--out", type=Path, help="[default: runs/speed/attached, or runs/speed/blocks]")
@click.option("--blocks", is_flag=True, help="Default blocks instead of heads.")
def time_attached(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    seconds: float,
    device: str,
    out: Path | None,
    blocks: bool,
) -> None:
    """A model with a head, or blocks, attached against the same model without."""
    with told_errors():
        out = out or Path("runs") / "speed" / ("blocks" if blocks else "attached")
        measure = attached.measure_blocks if blocks else attached.measure
        rows = []
        for row in measure(models, batches, seconds, device):
            rows.append(row)
            click.echo(json.dumps(row))
        results = {"machine": _machine(device), "versions": versions(), "rows": rows}
        text = json.dumps(results, indent=1, sort_keys=True) + "\n"
        summary = attached.blocks_to_markdown(rows) if blocks else attached.to_markdown(rows)
        write_atomic(out / "results.json", text.encode())
        write_atomic(out / "summary.md", summary.encode())
        click.echo(f"Wrote {out}/results.json and summary.md")


def _machine(device: str) -> dict[str, str | int]:
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
