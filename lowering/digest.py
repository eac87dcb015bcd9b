"""A digest of simplex's own sources, for the compile caches' key.

A cached graph holds what the autograd formula, the fake kernels and the pass made of it, and
none of their sources is in torch's key: without this an upgrade could run the old answer.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

PACKAGES = ("simplex_ops", "csrc_free", "lowering")


@functools.cache
def sources() -> str:
    """Return sixteen hexadecimal digits that change with any source file of the packages."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
