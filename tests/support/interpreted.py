"""Triton's interpreter, without a search that it makes again for every call of a jit function.

Each call, nested ones too, lists all that triton.language has in order to exchange its built-in
functions: two fifths of the time of these tests. What is built in does not change between calls.
"""

import inspect
from typing import Any

from triton import language as tl
from triton.runtime import interpreter


def search_once() -> None:
    """Let the interpreter remember which names of a module or a class are built in."""
    patch = getattr(interpreter, "_patch_builtin", None)
    if patch is None or list(inspect.signature(patch).parameters) != ["pkg", "builder", "scope"]:
        return  # another release, which may search as it likes
    names: dict[Any, list[str]] = {}

    def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in names:  # so far as it was never exchanged
            names[pkg] = [n for n, member in inspect.getmembers(pkg) if tl.core.is_builtin(member)]
        for name in names[pkg]:
            member = getattr(pkg, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
