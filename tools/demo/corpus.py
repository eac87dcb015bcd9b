"""Real text that is on every machine: the source of the Python standard library, as bytes.

Files are sorted by path, and the hash of a file's path alone decides whether it is held out, so
the same interpreter always gives the same split.
"""

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_ONE_IN = 16
_SKIPPED = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_SEPARATOR = b"\0"  # between files; in no Python source


def sources(root: Path | None = None) -> list[Path]:
    """List the *.py files under `root`, without tests and installed packages.

    Raises:
        FileNotFoundError: no such file there, as where the library is zipped.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = sorted(p for p in root.rglob("*.py") if _SKIPPED.isdisjoint(p.relative_to(root).parts))
    if not found:
        raise FileNotFoundError(f"the corpus needs Python sources under {root}, found none")
    return found


def is_held_out(path: Path, root: Path) -> bool:
    """Say whether a file is for validation: one in `HELD_OUT_ONE_IN`, by the hash of its path."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def load(root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return (training, validation) bytes, uint8 [bytes] each, from disjoint sets of files."""
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sources(root):
        parts[is_held_out(path, root)].append(path.read_bytes())
    training, validation = (
        torch.frombuffer(bytearray(_SEPARATOR.join(parts[held_out])), dtype=torch.uint8)
        for held_out in (False, True)
    )
    return training, validation


def random_batch(data: Tensor, batch: int, seq: int, generator: torch.Generator) -> Tensor:
    """Draw `batch` stretches of seq + 1 bytes, int64 [batch, seq + 1]: inputs and their targets."""
    starts = torch.randint(data.numel() - seq, (batch,), generator=generator)
    return _stretches(data, starts, seq)


def even_batches(data: Tensor, batch: int, seq: int, count: int) -> list[Tensor]:
    """Return `count` batches of stretches that lie evenly over `data`: always the same ones."""
    starts = torch.linspace(0, data.numel() - seq - 1, batch * count).long()
    return [_stretches(data, chunk, seq) for chunk in starts.chunk(count)]


def _stretches(data: Tensor, starts: Tensor, seq: int) -> Tensor:
    return data[starts[:, None] + torch.arange(seq + 1)].long()
