"""A digest of simplex's own sources, as a part of the compile caches' keys.

A cached graph holds what the autograd formula, the fake kernels and the pass made of it, and
none of their sources is in torch's key: without this an upgrade could run the old answer.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

import torch

PACKAGES = ("simplex_ops", "csrc_free", "lowering")


def extend(*more: str) -> None:
    """Let the key of every graph that this thread compiles from here on hold the digest, and more.

    The fake kernels call it: tracing runs them, in the thread that then asks the caches. Importing
    would be too early, since from torch 2.13 on (not in 2.11) a thread does not see what another
    put into `torch.compiler.config`.
    """
    config = torch.compiler.config
    for tag in (f"simplex:{sources()}", *more):
        if tag not in config.cache_key_tag:
            config.cache_key_tag += f"|{tag}"  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def sources() -> str:
    """Return sixteen hexadecimal digits that change with any source file of the packages.

    Of the measured tables, which are data, only what can change a launch choice counts.
    """
    from csrc_free import measured

    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    for path in sorted(measured.ROOT.glob("*.json")):
        digest.update(f"{path.name}\0{measured.read_choosing(path.read_text())}".encode())
    return digest.hexdigest()[:16]
