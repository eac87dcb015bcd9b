"""All objects of a type that live in the process, those that gc.freeze() hides among them."""

import gc
import sys
from collections.abc import Iterator
from typing import Any


def living(kinds: tuple[type, ...]) -> list[Any]:
    """Return the live objects of some types, but for those that are frozen."""
    # By type(), since isinstance() asks objects, and among all that live are dead weak proxies.
    return [o for o in gc.get_objects() if issubclass(type(o), kinds)]


def frozen(kinds: tuple[type, ...]) -> list[Any]:
    """Return those of some types that live, and others, where anything is frozen.

    gc.get_objects() leaves out what gc.freeze() was called over. So all is looked through that can
    be reached from modules and from the frames of all threads: a second in a large process.
    """
    return [o for o in _reached() if issubclass(type(o), kinds)] if gc.get_freeze_count() else []


def _reached() -> Iterator[Any]:
    pending: list[Any] = [sys.modules, *_variables()]
    reached = {id(o): o for o in pending}  # held, so that no other object takes an id
    while pending:
        found = {id(o): o for o in gc.get_referents(*pending) if gc.is_tracked(o)}
        pending = [o for number, o in found.items() if number not in reached]
        reached.update((id(o), o) for o in pending)
        yield from pending


def _variables() -> Iterator[dict[str, Any]]:
    for innermost in sys._current_frames().values():
        frame = innermost
        while frame is not None:
            yield from (frame.f_locals, frame.f_globals)
            frame = frame.f_back
