"""Tensor parallelism: each process holds some of the heads, and what heads share must be the same in all processes."""

from __future__ import annotations

import torch


class Ranks:
    """The processes a model's heads are spread over, each with equally many."""

    def __init__(self, mesh: torch.distributed.DeviceMesh):
        names = mesh.mesh_dim_names or ()
        self.group = mesh["tp"].get_group() if "tp" in names else mesh.get_group()

    def __reduce__(self) -> tuple:
        raise TypeError(
            "the cache of a tensor-parallel model can't be pickled: its processes are of this run. Have each of them call "
            "cache.save(path) with a path of its own"
        )

    def __deepcopy__(self, memo: dict) -> Ranks:
        return self

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of `tensor` over all processes, the same in each of them; every process must ask for it."""
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total / torch.distributed.get_world_size(self.group)
