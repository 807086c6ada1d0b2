"""What could give another result without a word: threads, edited code, ranks, odd folders."""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.torture.crash import make_photographs, small_backbone
from benchmarks.torture.outcome import Outcome
from featxfer import (
    Backbone,
    FeatureTransferHead,
    Preprocessing,
    PseudoLabelTrainer,
    Recipe,
    extract_features,
    fill_stores,
    open_images,
)
from featxfer.training.objectives import PairedRegression
from featxfer_integrations import CorruptedDegradation

NOISY = CorruptedDegradation(32, 8, blur_sigma=0.5, noise_std=0.1, jpeg_quality=50)


# Threads and processes


def run_threads(folder: Path, images: int = 200, readers: Sequence[int] = (1, 2, 4, 16)) -> Outcome:
    """Noisy views by so many reading threads, and by as many processes: the same bits.

    The process's own random state is what it was.
    """
    photographs = make_photographs(folder / "photographs", images)
    faults, stores = [], []
    state = torch.get_rng_state()
    for count in readers:
        with mock.patch("featxfer.features.readers.reader_count", lambda count=count: count):
            _extract(photographs, folder / f"threads{count}")
        stores.append(_contents(folder / f"threads{count}"))
    if not torch.get_rng_state().equal(state):
        faults.append("torch's random state was changed")
    context = multiprocessing.get_context("forkserver")
    for count in readers:
        cache = folder / f"processes{count}"
        processes = [
            context.Process(target=_extract, args=(photographs, cache, rank, count))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        stores.append(_contents(cache))
    names = [f"{count} {kind}" for kind in ("threads", "processes") for count in readers]
    faults += [
        f"{name}: other bits than one thread"
        for name, store in zip(names, stores, strict=True)
        if store != stores[0]
    ]
    return Outcome(len(names), faults)


def _extract(photographs: Path, cache: Path, rank: int = 0, world_size: int = 1) -> None:
    torch.set_num_threads(1)
    fill_stores(
        small_backbone(),
        open_images(photographs),
        NOISY,
        cache,
        part_rows=8,
        rank=rank,
        world_size=world_size,
    )


def _contents(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*.safetensors")}


# Edited code


class Edited(nn.Module):
    """A convolution, pooling, and a step that can be edited in ways that no weight shows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_backbone().module
        self.scale, self.factors = 1.0, [1.0, 1.0]
        self.act: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, images: Tensor) -> Tensor:
        """Features `(n, 8)`."""
        rows: Tensor = self.act(self.body(images) * self.scale * self.factors[0])
        return rows


def _forward(module: Edited, images: Tensor) -> Tensor:
    return 1 - Edited.forward(module, images)


EDITS: Sequence[tuple[str, Callable[[Edited], object]]] = (
    ("an attribute", lambda m: setattr(m, "scale", 2.0)),
    ("an entry of a list", lambda m: m.factors.__setitem__(0, 3.0)),
    ("a function", lambda m: setattr(m, "act", torch.tanh)),
    ("a forward of its own", lambda m: setattr(m, "forward", lambda x: _forward(m, x))),
    ("a hook", lambda m: m.register_forward_hook(lambda *args: args[-1] + 1)),
    ("a weight", lambda m: next(m.parameters()).data.add_(1)),
    ("its dtype", lambda m: m.to(torch.float64).body.register_forward_pre_hook(_to_double)),
)
"""What is done to a backbone between two extractions into one cache."""


def _to_double(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].double(),)


def run_edited(folder: Path) -> Outcome:
    """After each edit the rows are those of the edited backbone, not those that were kept."""
    images = open_images(make_photographs(folder / "photographs", 12))
    faults = []
    for number, (name, edit) in enumerate(EDITS):
        module = Edited().eval()
        backbone = Backbone(module, Preprocessing(), "edited")
        with contextlib.redirect_stderr(io.StringIO()):
            extract_features(backbone, images, NOISY, folder / f"cache{number}", part_rows=4)
            edit(module)
            kept = extract_features(backbone, images, NOISY, folder / f"cache{number}", part_rows=4)
            fresh = extract_features(backbone, images, NOISY, folder / f"new{number}", part_rows=4)
        if not (kept.hr.equal(fresh.hr) and kept.lr.equal(fresh.lr)):
            faults.append(f"{name}: the old rows came back")
    return Outcome(len(EDITS), faults)


# Ranks

RECIPE = Recipe(
    epochs=6, batch_size=12, learning_rate=3e-3, optimizer="adamw", schedule="one-cycle", patience=2
)
MOST_DIFFERENCE = 1e-5


def run_ranks(folder: Path, sizes: Sequence[int] = (1, 2, 3), rows: int = 48) -> Outcome:
    """A head in so many processes, with held-out rows: each has the same weights, and stops."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    faults = []
    found: dict[int, list[bytes]] = {}
    for size in sizes:
        meeting = folder / f"meeting{size}"
        processes = [
            context.Process(target=_train, args=(folder, meeting, rank, size, rows))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.exitcode != 0:
                faults.append(f"{size} ranks: exit code {process.exitcode}")
                process.kill()
        files = [folder / f"{size}-{rank}.pt" for rank in range(size)]
        found[size] = [path.read_bytes() for path in files if path.exists()]
        if len({hashlib.sha256(data).hexdigest() for data in found[size]}) > 1:
            faults.append(f"{size} ranks: other weights on each")
    return Outcome(sum(sizes), faults)


def _train(folder: Path, meeting: Path, rank: int, size: int, rows: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(0)
    hr, lr = (torch.randn(rows, 6, generator=generator) for _ in range(2))
    mine = slice(rank * rows // size, (rank + 1) * rows // size)
    head = FeatureTransferHead(6, 4, 16, dropout=0.0)
    head.set_input_statistics(lr)
    trainer = PseudoLabelTrainer(
        DistributedDataParallel(head), RECIPE, objective=PairedRegression(6.0)
    )
    held_out = (torch.randn(6 + rank, 6, generator=generator), torch.randn(6 + rank, 6))
    trainer.fit(lr[mine], hr[mine], held_out=held_out)
    state = b"".join(value.numpy().tobytes() for value in head.state_dict().values())
    (folder / f"{size}-{rank}.pt").write_bytes(state)
    dist.destroy_process_group()


# Folders

NAMES = ("a", "b.c", "ä ö", ".hidden", "UPPER", "0", "x" * 60)
ENDINGS = (".png", ".PNG", ".jpg", ".gif", ".txt", "", ".jfif", ".png.bak", ".tiff", ".JP2")


def run_folders(folder: Path, count: int, seed: int) -> Outcome:
    """Trees by chance: each image is taken once, and all else is told, with how many there are."""
    faults = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        root = folder / f"tree{number}"
        files = _make_tree(root, rng)
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                images = open_images(root)
        except ValueError as error:
            taken, said = 0, str(error)
        else:
            taken, said = len(images), told.getvalue()
            if len(set(images.ids)) != taken:
                faults.append(f"tree {number}: an image twice")
            for index in range(taken):
                images.read(index)
        left_out = sum(int(n) for n in re.findall(r"(\d+) (?:of other kinds|hidden)", said))
        if taken + left_out != files:
            faults.append(f"tree {number}: {files} entries, {taken} taken, told {said!r}")
    return Outcome(count, faults)


def _make_tree(root: Path, rng: np.random.Generator) -> int:
    """Some files in some folders of folders; returns how many entries there are to be told of."""
    root.mkdir(parents=True)
    folders, entries = [root], 0
    for name in rng.permutation(NAMES)[: rng.integers(0, 5)]:
        parent = folders[int(rng.integers(len(folders)))]
        inner = parent / str(name)
        inner.mkdir()
        if not name.startswith("."):
            folders.append(inner)  # what is in a hidden one is not looked at
        else:
            entries += 1
    image: Any = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for index in range(int(rng.integers(0, 12))):
        parent = folders[int(rng.integers(len(folders)))]
        hidden = "." * int(rng.integers(0, 5) == 0)
        path = parent / f"{hidden}f{index}{rng.choice(ENDINGS)}"
        written = io.BytesIO()
        image.save(written, str(rng.choice(["PNG", "JPEG", "GIF", "TIFF"])))
        path.write_bytes(written.getvalue())
        entries += 1
    return entries
