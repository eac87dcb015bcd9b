"""Whether explain() runs a model: marked modules then attend as they would without their mark."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_state = threading.local()


def watching() -> bool:
    """Say whether `explain` runs the model on this thread."""
    return getattr(_state, "on", False)


@contextmanager
def watch() -> Iterator[None]:
    """Run marked modules without their marks, on this thread, for the block."""
    before, _state.on = watching(), True
    try:
        yield
    finally:
        _state.on = before
