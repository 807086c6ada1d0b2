"""`python -m benchmarks.torture`: every part at full length, and what it found."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.common.markdown import nested, to_markdown
from benchmarks.common.results import write_results
from benchmarks.common.shell import chosen
from benchmarks.common.versions import versions
from benchmarks.torture.artefacts import run_artefacts
from benchmarks.torture.crash import run_flipped, run_killed, run_refused, run_together
from benchmarks.torture.hostile import run_archives
from benchmarks.torture.numbers import run_numbers
from benchmarks.torture.outcome import Outcome
from benchmarks.torture.repeats import run_repeats
from benchmarks.torture.silent import run_edited, run_folders, run_ranks, run_threads

PARTS: Mapping[str, tuple[str, Callable[[Path, int], Outcome]]] = {
    "killed": ("SIGKILL during extraction", lambda f, seed: run_killed(f, 200, seed)),
    "refused": ("writes, fsyncs and renames that fail once", lambda f, _: run_refused(f)),
    "together": ("processes on one store", lambda f, _: run_together(f)),
    "flipped": ("flipped bytes of a store", lambda f, _: run_flipped(f)),
    "artefacts": ("malformed heads", lambda f, seed: run_artefacts(f, seed)),
    "archives": ("hostile archives", lambda f, _: run_archives(f)),
    "numbers": ("odd features", lambda _, seed: run_numbers(1000, seed)),
    "repeats": ("the same run again, and laid out otherwise", lambda f, _: run_repeats(f, 5)),
    "threads": ("noisy views by threads and processes", lambda f, _: run_threads(f)),
    "edited": ("a backbone edited between two runs", lambda f, _: run_edited(f)),
    "ranks": ("a head in several processes", lambda f, _: run_ranks(f)),
    "folders": ("odd folders", lambda f, seed: run_folders(f, 300, seed)),
}
"""What is run, by the name for `--parts`: from a folder and a seed to what was found."""


@click.command(context_settings={"show_default": True})
@click.option("--parts", help="Names, with commas between.  [default: every one]")
@click.option("--seed", default=0, help="Of moments, flipped bits and odd features.")
@click.option("--out", type=Path, default=Path("runs/torture"))
def main(parts: str | None, seed: int, out: Path) -> None:
    """Writes results.json and summary.md; exit 1 where anything went wrong."""
    names = chosen("--parts", parts, PARTS)
    results: dict[str, Any] = {"seed": seed, "versions": versions(), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            begin = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = PARTS[name][1](Path(folder) / name, seed)
            seconds = time.perf_counter() - begin
            click.echo(f"{name}: {outcome.cases} cases, {len(outcome.faults)} faults", err=True)
            for fault in outcome.faults:
                click.echo(f"  {fault}", err=True)
            results["parts"][name] = {**vars(outcome), "seconds": round(seconds, 1)}
    write_results(out, results, summary(results))
    raise SystemExit(any(part["faults"] for part in results["parts"].values()))


def summary(results: Mapping[str, Any]) -> str:
    """A line a part."""
    return to_markdown(
        results["parts"].items(),
        [
            ("", lambda part: PARTS[part[0]][0]),
            ("cases", lambda part: f"{part[1]['cases']:,}"),
            ("faults", lambda part: str(len(part[1]["faults"]))),
            ("besides", lambda part: _figures(part[1]["figures"])),
        ],
    )


def _figures(figures: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {nested(value, '.2g')}" for name, value in figures.items())


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.torture")
