"""Which program a launch compiles to, told from its sources: two of one are compiled once.

A kernel's own text, that of every function of ours that it calls, the constants these name, and
what the launch specialises. Not comments, not spacing, and no code on the host: Triton's own key
changes where a line above a kernel does.
"""

import functools
import hashlib
import inspect
import textwrap
import tokenize
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction

from tools.compiled.launches import Launch

_OURS = ("csrc_free", "tests")


def fingerprint(launch: Launch) -> str:
    """Return sixteen hexadecimal digits of the program that a launch asks for."""
    said = (
        _sources_of(launch.kernel), launch.signature, launch.constants, launch.divisible,
        launch.options,
    )  # fmt: skip
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


@functools.cache
def _sources_of(kernel: JITFunction) -> str:
    found: dict[str, str] = {}
    _add_sources(kernel.fn, found)
    return repr(sorted(found.items()))


def _add_sources(function: FunctionType, found: dict[str, str]) -> None:
    name = f"{function.__module__}.{function.__qualname__}"
    if name in found:
        return
    found[name] = code_of(inspect.getsource(function))
    for used in sorted(set(_names_in(function.__code__))):
        value = function.__globals__.get(used)
        inner = _python_of(value)
        if inner is not None:
            if inner.__module__.split(".")[0] in _OURS:
                _add_sources(inner, found)
        elif isinstance(value, tl.constexpr):
            found[f"{function.__module__}.{used}"] = repr(value.value)
        elif isinstance(value, (int, float, str, tuple)):
            found[f"{function.__module__}.{used}"] = repr(value)


def code_of(source: str) -> str:
    """Return a text's tokens without comments and spacing; indentation is one level or another.

    The same on every Python: an f-string is one token, as it was before 3.12.
    """
    marks = {tokenize.INDENT: ">", tokenize.DEDENT: "<"}
    lines = textwrap.dedent(source).splitlines(keepends=True)
    found: list[str] = []
    opened: list[tuple[int, int]] = []  # where the f-strings begin that a token is inside of
    for token in tokenize.generate_tokens(iter(lines).__next__):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            opened.append(token.start)
        elif kind == "FSTRING_END":
            start = opened.pop()
            if not opened:
                found.append(_between(lines, start, token.end))
        elif not opened and kind not in ("COMMENT", "NL"):
            found.append(marks.get(token.type, token.string))
    return "\0".join(found)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """Return the text from one (row, column) to another; rows count from 1."""
    (first, begin), (last, stop) = start, end
    rows = [*lines[first - 1 : last - 1], lines[last - 1][:stop]]
    return "".join(rows)[begin:]


def _python_of(value: Any) -> FunctionType | None:
    """Return the Python function behind one of Triton's or Gluon's, or a plain one."""
    inner = getattr(value, "fn", value)
    return inner if isinstance(inner, FunctionType) else None


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
