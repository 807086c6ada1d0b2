"""The main job, cold and warm: where its time goes, and how much of it is arithmetic."""

from __future__ import annotations

import pstats
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import to_markdown

COMMAND = ("-m", "benchmarks.voc2007")


@dataclass(frozen=True)
class Routine:
    """A function, by the end of its file's name and its own."""

    file: str
    name: str

    def seconds(self, profile: pstats.Stats) -> float:
        """In it and in what it called."""
        functions = profile.stats.items()  # type: ignore[attr-defined]
        found: list[float] = [
            cumulative
            for (file, _, name), (_, _, _, cumulative, _) in functions
            if name == self.name and Path(file).as_posix().endswith(self.file)
        ]
        return sum(found)


STAGES: Mapping[str, tuple[Routine, Routine]] = {
    "render the sample": (
        Routine("voc2007/sample_devkit.py", "render_sample"),
        Routine("voc2007/sample.py", "draw"),
    ),
    "features and maps": (
        Routine("featxfer/features/extract.py", "fill_stores"),
        Routine("featxfer/features/forward.py", "__call__"),
    ),
    "k-means": (
        Routine("featxfer/training/pseudo_labels.py", "kmeans"),
        Routine("extra_wrappers.py", "train"),
    ),
    "heads and blocks": (
        Routine("featxfer/training/trainer.py", "fit_rows"),
        Routine("featxfer/training/trainer.py", "step"),
    ),
    "SVMs": (
        Routine("featxfer/evaluation/svm.py", "train_svms"),
        Routine("evaluation/batched_svm.py", "solve"),
    ),
    "figures": (
        Routine("voc2007/figures.py", "draw"),
        Routine("manifold/_t_sne.py", "fit_transform"),
    ),
}
"""What the job does, and the routine within that does the arithmetic: the stage's floor."""


def measure_job(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """The command in fresh processes: with an empty cache, again, and once more profiled.

    Args:
        arguments: of `python -m benchmarks.voc2007`, but for its folders.
        folder: for caches, results and the profile.
    """
    profile = folder / "profile"
    cold = _seconds(COMMAND, arguments, folder / "cache")
    warm = _seconds(COMMAND, arguments, folder / "cache")
    watched = ("-m", "cProfile", "-o", str(profile), *COMMAND)
    profiled = _seconds(watched, [*arguments, "--jobs", "1"], folder / "profiled")
    stats = pstats.Stats(str(profile))
    stages = {
        name: {"seconds": stage.seconds(stats), "floor": floor.seconds(stats)}
        for name, (stage, floor) in STAGES.items()
    }
    rest = profiled - sum(stage["seconds"] for stage in stages.values())
    stages["imports, tables and the rest"] = {"seconds": rest, "floor": 0.0}
    return {"cold": cold, "warm": warm, "profiled": profiled, "stages": stages}


def _seconds(command: Sequence[str], arguments: Sequence[str], cache: Path) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command, *arguments, "--cache", str(cache), "--out", f"{cache}-out"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def summary(job: Mapping[str, Any]) -> str:
    """A line a stage: seconds, its share, and those of its floor; then the whole."""
    total, floor = job["profiled"], sum(stage["floor"] for stage in job["stages"].values())
    whole = {"all, one process, profiled": {"seconds": total, "floor": floor}}
    table = to_markdown(
        {**job["stages"], **whole}.items(),
        [
            ("stage", lambda stage: stage[0]),
            ("s", lambda stage: f"{stage[1]['seconds']:.1f}"),
            ("share, %", lambda stage: f"{100 * stage[1]['seconds'] / total:.0f}"),
            ("arithmetic, s", lambda stage: f"{stage[1]['floor']:.1f}"),
        ],
    )
    return (
        f"{table}\nCold {job['cold']:.1f} s, warm {job['warm']:.1f} s "
        f"({100 * job['warm'] / job['cold']:.0f}% of cold); "
        f"all is {total / floor:.2f} times the arithmetic.\n"
    )
