"""The processes that train one module together, as `DistributedDataParallel` has them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """The group of a `DistributedDataParallel`; of any other module this process alone.

    A process alone communicates with none, whatever else `torch.distributed` does in it.

    Args:
        module: that is trained; what is sent goes by the device of its parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.group: Any = None
        self.rank, self.size = 0, 1
        self.module = module
        if isinstance(module, DistributedDataParallel):
            self.group = module.process_group
            self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape from all processes, stacked in their order, on the CPU."""
        if self.group is None:
            return tensor.cpu()[None]
        own = tensor.to(next(self.module.parameters()).device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.stack(parts).cpu()

    def numbers(self, *values: float) -> Tensor:
        """Numbers from all processes: float64 `(processes, values)`, on the CPU."""
        return self.gather(torch.tensor(values, dtype=torch.float64, device="cpu"))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the values that the first one has."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one process raises an error inside, all do: none waits for one that is gone."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.numbers(error is not None)[:, 0].nonzero().flatten().tolist()
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(
                f"training has ended in all processes: there was an error in {failed} of "
                f"{self.size}, which they tell"
            )

    def generators(self, seed: int) -> dict[str, torch.Generator]:
        """On the CPU: of the "order" of rows, one in all; and of "dropout", another in each."""
        own = (seed * self.size + self.rank) % 2**63
        seeds = {"order": seed, "dropout": own}
        return {name: torch.Generator("cpu").manual_seed(n) for name, n in seeds.items()}

    def count_rows(self, order: Sized) -> int:
        """Rows of all processes; `ValueError` in all unless each has as many, and some."""
        counts = [int(count) for count in self.numbers(len(order))]
        if 0 in counts or len(set(counts)) > 1:
            raise ValueError(
                f"rows: got {counts} rows in {len(counts)} processes, wanted some, as many in each"
            )
        return sum(counts)

    def check_same_training(self, settings: Mapping[str, Any], path: Path | None) -> None:
        """Raises `ValueError` in all processes unless all were asked for the same training."""
        asked = {
            "recipe, seed, precision, objective, held_out": zlib.crc32(repr(settings).encode()),
            "checkpoint": path is not None,
            "checkpoint's file": path is not None and path.exists(),
        }
        for name, given in zip(asked, self.numbers(*asked.values()).T, strict=True):
            if not bool((given == given[0]).all()):
                raise ValueError(
                    f"{name}: got others in some of {self.size} processes, wanted the same in all"
                )
