"""Several processes that train one model: each has a part of every batch, and all take the same step.

The result is that of one process with the whole batch: pooled vectors are gathered with their gradients, so that every
clip has all others of the batch as negatives, and gradients are averaged.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UsageError

PATIENCE = timedelta(hours=12)  # one process encodes the texts while the others wait; torchrun notices one that died


class Group:
    """The processes of a training; alone unless `torchrun` started several."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This process's part of n items, n a multiple of the number of processes."""
        each = n // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, rows: Tensor) -> Tensor:
        """(B / size, d) of every process -> (B, d), in order of rank; gradients flow back to the rows' process."""
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self)
        return gathered

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module to train: among several processes in torch's DDP, whose backward pass averages the gradients."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def average(self, numbers: list[Tensor]) -> list[Tensor]:
        """Averages of scalars over the processes."""
        if self.size == 1:
            return numbers
        together = torch.stack([number.detach() for number in numbers])
        dist.all_reduce(together)
        return list(together / self.size)

    def say_to_all(self, value: Any) -> Any:
        """What process 0 has, given to every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


class _Gather(torch.autograd.Function):
    """All processes' rows. Every process then computes the same loss of them, so that the gradient of the sum of these
    equal losses, which DDP's average divides by their number, is `size` times its own."""

    @staticmethod
    def forward(context: Any, rows: Tensor, group: Group) -> Tensor:
        context.group = group
        parts = [torch.empty_like(rows) for _ in range(group.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        group: Group = context.group
        return gradients[0][group.part(len(gradients[0]))] * group.size, None


def join(device: str) -> tuple[Group, str]:
    """The group that `torchrun` set up (from its environment variables), and this process's device.

    Args:
        device: As torch names it; with several processes `cuda` becomes the GPU of this process's local rank.

    Raises:
        UsageError: Fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group(), device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda"):
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}",
                "Start as many processes as there are GPUs: torchrun --nproc-per-node N",
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size()), device


def leave(group: Group) -> None:
    """Ends what `join` began."""
    if group.size > 1:
        dist.destroy_process_group()
