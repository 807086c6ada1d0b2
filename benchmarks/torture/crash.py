"""Extraction that is killed, that cannot write, or that several processes do at once."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from benchmarks.torture.outcome import Outcome
from featxfer import Backbone, Degradation, Preprocessing, fill_stores, open_images
from featxfer.features.store import FeatureStore, damaged_parts
from featxfer.files import DiskError

PART_ROWS = 4
COMPARED = 2
"""Views that a run computes again where a store has rows, to compare them: one image's."""

VIEW = Degradation(lr_size=8, hr_size=32)


@dataclass(frozen=True)
class Job:
    """An extraction of both views.

    Args:
        images: folder.
        root: folder of stores and of the count of views that were computed.
    """

    images: Path
    root: Path

    @property
    def cache(self) -> Path:
        """Folder of the stores."""
        return self.root / "cache"

    def run(self, rank: int = 0, world_size: int = 1) -> None:
        """Extracts, and adds a byte to a file for each view of an image that is computed."""
        torch.set_num_threads(1)
        self.root.mkdir(parents=True, exist_ok=True)
        backbone = small_backbone()

        def count(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            with open(self.root / "computed", "ab", buffering=0) as file:
                file.write(b"." * len(inputs[0]))

        backbone.module.register_forward_pre_hook(count)
        fill_stores(
            backbone,
            open_images(self.images),
            VIEW,
            self.cache,
            part_rows=PART_ROWS,
            rank=rank,
            world_size=world_size,
        )

    @property
    def computed(self) -> int:
        """How many views of images have been computed, in all runs."""
        said = self.root / "computed"
        return said.stat().st_size if said.exists() else 0

    def contents(self) -> dict[str, bytes]:
        """Every file of the stores but what a killed process left half written."""
        paths = (path for path in self.cache.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.cache)): path.read_bytes()
            for path in paths
            if path.suffix != ".tmp"
        }

    def damaged(self) -> list[Path]:
        """Parts that are not what was written."""
        return [part for store in self.cache.glob("*-*") for part in damaged_parts(store)]


def small_backbone() -> Backbone:
    """A convolution and pooling, of seed 0: 8 features."""
    generator = torch.Generator().manual_seed(0)
    convolution: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, 3, 8, 3, stride=2)
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    module = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone(module, Preprocessing((0.5,) * 3, (0.5,) * 3), "small", "seed 0")


def make_photographs(folder: Path, count: int) -> Path:
    """PNG files of noise, of several sizes and tints; returns their folder."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        noise = rng.uniform(0, 256, (40 + index % 7, 60 - index % 5, 3))
        pixels = noise * rng.uniform(0.1, 1, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


class Faults:
    """Counts guarded calls, and does `fault` at the one numbered `at`, from 1."""

    def __init__(self, at: int, fault: Callable[[], None]) -> None:
        self.at, self.fault, self.calls = at, fault, 0

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, guarded."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                self.fault()
            return run(*args, **kwargs)

        return guarded


class _HalfWritten(io.FileIO):
    """Writes half, then what is guarded, then the rest."""

    faults: Faults

    def write(self, data: Any) -> int:
        super().write(data[: len(data) // 2])
        self.faults(super().write)(data[len(data) // 2 :])
        return len(data)


@contextmanager
def guarded(faults: Faults) -> Iterator[None]:
    """Every write, fsync and rename of featxfer's files goes through `faults`."""

    def half_written(path: Path, mode: str) -> _HalfWritten:
        file = _HalfWritten(path, mode.replace("b", ""))
        file.faults = faults
        return file

    with (
        mock.patch("featxfer.files.open", half_written, create=True),
        mock.patch("featxfer.files.os.fsync", faults(os.fsync)),
        mock.patch("featxfer.files.os.replace", faults(os.replace)),
    ):
        yield


def _suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing() -> None:
    """No fault: calls are counted."""


def _fail(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _child(job: Job, ready: Connection, at: int, rank: int, world_size: int) -> None:
    """An extraction that says when it starts, and kills itself at the call `at`, if that is > 0."""
    tqdm.set_lock(threading.RLock())  # its own would outlive a killed process
    ready.send(None)
    with guarded(Faults(at, _suicide)):
        job.run(rank, world_size)


@contextmanager
def started(
    job: Job, *, at: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[ForkServerProcess]:
    """Another process that has just begun to extract; it has ended when this is left."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, its, at, rank, world_size))
    process.start()
    its.close()
    mine.recv()
    try:
        yield process
    finally:
        process.join()
        mine.close()


def run_killed(folder: Path, count: int, seed: int, parts: int = 24) -> Outcome:
    """SIGKILL at `count` random moments, and once at every write, fsync and rename.

    What is there then is whole, the next run computes at most one part again, and the store is
    that of an undisturbed run, bit for bit.
    """
    photographs = make_photographs(folder / "photographs", parts * PART_ROWS)
    took = []
    for number in range(5):  # the first is the slowest by far
        undisturbed = Job(photographs, folder / f"undisturbed{number}")
        with started(undisturbed) as process:
            began = time.perf_counter()
            process.join()
            took.append(time.perf_counter() - began)
    seconds = sorted(took)[2]
    rng = np.random.default_rng(seed)
    faults: list[str] = []
    in_between = 0
    for number in range(count):
        job = Job(photographs, folder / f"moment{number}")
        moment = float(rng.uniform(0, seconds))
        with started(job) as process:
            time.sleep(moment)
            process.kill()
        in_between += 0 < job.computed < undisturbed.computed
        faults += _after(job, undisturbed, f"killed after {moment:.4f} s")
    counted = Faults(0, _nothing)
    with guarded(counted):
        Job(photographs, folder / "counted").run()
    for at in range(1, counted.calls + 1):
        job = Job(photographs, folder / f"call{at}")
        with started(job, at=at) as process:
            pass
        if process.exitcode != -signal.SIGKILL:
            faults.append(f"call {at}: not killed, {process.exitcode}")
        faults += _after(job, undisturbed, f"killed at call {at} of {counted.calls}")
    figures = {"moments": count, "calls": counted.calls, "between first and last": in_between}
    return Outcome(count + counted.calls, faults, figures)


def _after(job: Job, undisturbed: Job, name: str) -> list[str]:
    """What is wrong after an interrupted run and after the run that goes on."""
    faults = [f"{name}: {part.name} is damaged" for part in job.damaged()]
    wanted = undisturbed.contents()
    kept = job.contents()
    if not kept.items() <= wanted.items():
        faults.append(f"{name}: files that an undisturbed run does not write")
    job.run()
    if job.contents() != wanted:
        faults.append(f"{name}: another store than that of an undisturbed run")
    if job.computed > undisturbed.computed + PART_ROWS + COMPARED:
        faults.append(f"{name}: {job.computed} views computed, of {undisturbed.computed}")
    return faults


def run_refused(folder: Path) -> Outcome:
    """Each write, fsync and rename fails once, for want of room and for an error of the disk.

    One `DiskError` with the bytes needed, what was written before intact, and the next run ends.
    """
    photographs = make_photographs(folder / "photographs", 3 * PART_ROWS)
    undisturbed = Job(photographs, folder / "undisturbed")
    counted = Faults(0, _nothing)
    with guarded(counted):
        undisturbed.run()
    faults: list[str] = []
    for number in (errno.ENOSPC, errno.EIO):
        for at in range(1, counted.calls + 1):
            job = Job(photographs, folder / f"{number}-{at}")
            name = f"{errno.errorcode[number]} at call {at} of {counted.calls}"
            try:
                with guarded(Faults(at, _fail(number))):
                    job.run()
            except DiskError as error:
                if "bytes needed" not in str(error) or error.errno != number:
                    faults.append(f"{name}: told {error}")
            else:
                faults.append(f"{name}: no error")
            if list(job.cache.rglob("*.tmp")):
                faults.append(f"{name}: half a file is left")
            faults += _after(job, undisturbed, name)
    return Outcome(2 * counted.calls, faults)


def run_together(folder: Path, most_images: int = 17) -> Outcome:
    """1, 2, 3 and 5 processes share 1 to `most_images` images, and two do the same ones at once."""
    faults: list[str] = []
    cases = 0
    for count in range(1, most_images + 1):
        photographs = make_photographs(folder / f"photographs{count}", count)
        undisturbed = Job(photographs, folder / f"undisturbed{count}")
        undisturbed.run()
        for world_size, ranks in ((1, 1), (2, 2), (3, 3), (5, 5), (1, 2)):
            job = Job(photographs, folder / f"{count}-{world_size}-{ranks}")
            name = f"{count} images, {ranks} processes of {world_size}"
            with ExitStack() as running:
                processes = [
                    running.enter_context(started(job, rank=r % world_size, world_size=world_size))
                    for r in range(ranks)
                ]
            cases += 1
            codes = [process.exitcode for process in processes]
            if any(codes):
                faults.append(f"{name}: exit codes {codes}")
            if job.contents() != undisturbed.contents():
                faults.append(f"{name}: other rows than one process")
            if ranks == world_size and not 0 <= job.computed - 2 * count <= ranks * COMPARED:
                faults.append(f"{name}: {job.computed} views computed")
    return Outcome(cases, faults)


def run_flipped(folder: Path, every: int = 1) -> Outcome:
    """`featxfer cache verify` after each byte, or every so many, is flipped: it names the file."""
    from click.testing import CliRunner

    from featxfer.cli import main

    job = Job(make_photographs(folder / "photographs", 2), folder / "job")
    job.run()
    arguments = ["cache", "verify", str(job.cache)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    cases, faults = 0, []
    for path in sorted(path for path in job.cache.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for position in range(0, len(data), every):
            changed = bytes([data[position] ^ 1])
            path.write_bytes(data[:position] + changed + data[position + 1 :])
            told = CliRunner().invoke(main, arguments)
            cases += 1
            if told.exit_code != 1 or f"damaged: {path};" not in told.output:
                faults.append(f"{path.name}, byte {position}: {told.output!r}")
        path.write_bytes(data)
    FeatureStore.open(next(job.cache.glob("hr-*"))).read()
    return Outcome(cases, faults)
