"""The text of `language`: sources and documents that this Python environment holds, as bytes.

The standard library, and whatever packages are installed beside it. A file whose content another
has already given is left out, and so are files above `LARGEST` bytes, which are tables more often
than text. The hash of a file's path alone decides whether it is held out.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".md", ".py", ".pyi", ".rst")
LARGEST = 500_000
HELD_OUT_ONE_IN = 32
LISTED = 0.01  # of the bytes: smaller packages are listed together
_INSTALLED = ("dist-packages", "site-packages")
_SEPARATOR = b"\0"  # between files


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes of other files, uint8 [bytes] each, and where they come from."""

    training: Tensor
    held_out: Tensor
    listing: dict[str, Any]


def roots() -> list[Path]:
    """Return the folders that are read: the standard library's, and those of installed packages."""
    installed = [Path(p) for p in sys.path if Path(p).name in _INSTALLED and Path(p).is_dir()]
    return [Path(sysconfig.get_path("stdlib")), *sorted({p.resolve() for p in installed})]


def load(folders: list[Path] | None = None) -> Text:
    """Read all files under `folders`, by default `roots()`; the same files give the same text.

    Raises:
        FileNotFoundError: there are too few for a part to train on and one to hold out.
    """
    folders = roots() if folders is None else folders
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    sizes: dict[str, int] = {}
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    for name, file in _files(folders):
        content = file.read_bytes()
        identity = hashlib.sha256(content).digest()
        if not content or len(content) > LARGEST or identity in seen:
            continue
        seen.add(identity)
        parts[is_held_out(name)].append(content)
        digest.update(name.encode() + identity)
        package = name.partition("/")[0].removesuffix(".py")
        sizes[package] = sizes.get(package, 0) + len(content)
    if not all(parts.values()):
        raise FileNotFoundError(
            f"the text needs files to train on and files to hold out ({', '.join(SUFFIXES)}) under "
            f"{', '.join(map(str, folders))}, found {len(seen)} files"
        )
    training, held_out = (
        torch.frombuffer(bytearray(_SEPARATOR.join(parts[held])), dtype=torch.uint8)
        for held in (False, True)
    )
    listing = {
        "digest": digest.hexdigest()[:16],
        "files": len(seen),
        "training_bytes": training.numel(),
        "held_out_bytes": held_out.numel(),
        "packages": _listed(sizes),
    }
    return Text(training, held_out, listing)


def is_held_out(name: str) -> bool:
    """Say whether a file is held out: one in `HELD_OUT_ONE_IN`, by the hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def _files(folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield (package/path, file), folder by folder, sorted by path."""
    for number, folder in enumerate(folders):
        for file in sorted(folder.rglob("*")):
            inside = file.relative_to(folder)
            other = {"__pycache__", *_INSTALLED}.intersection(inside.parts)
            if file.suffix in SUFFIXES and not other and file.is_file():
                yield (f"python/{inside.as_posix()}" if number == 0 else inside.as_posix()), file


def _listed(sizes: dict[str, int]) -> dict[str, int]:
    """Return bytes by package, largest first, and those of small packages as one."""
    least = LISTED * sum(sizes.values())
    listed = {p: n for p, n in sorted(sizes.items(), key=lambda s: -s[1]) if n >= least}
    small = [n for n in sizes.values() if n < least]
    return {**listed, **({f"{len(small)} smaller": sum(small)} if small else {})}


class Blocks:
    """Blocks of `seq` bytes in an order drawn from a seed: each byte is a target once in a pass."""

    def __init__(self, text: Tensor, seq: int, seed: int) -> None:
        self.text, self.seq = text, seq
        self.count = (text.numel() - 1) // seq
        if self.count < 1:
            raise ValueError(f"a block of {seq} bytes needs {seq + 1}, the text has {text.numel()}")
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)

    def draw(self, batch: int) -> Tensor:
        """Return the next blocks with the byte that follows each, int64 [batch, seq + 1]."""
        while len(self._order) < batch:
            passed = torch.randperm(self.count, generator=self._generator)
            self._order = torch.cat((self._order, passed))
        starts, self._order = self._order[:batch] * self.seq, self._order[batch:]
        starts = starts.to(self.text.device)
        return self.text[starts[:, None] + torch.arange(self.seq + 1, device=starts.device)].long()
