"""A process group of one rank, for what sharding does to a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@contextmanager
def one_rank(folder: Path) -> Iterator[Any]:
    """Give a mesh of one rank on the CPU."""
    store = dist.FileStore(str(folder / "ranks"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
