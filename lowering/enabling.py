"""enable() and disable(): the pass for every torch.compile(model) that ends in Inductor."""

from collections.abc import Callable
from types import TracebackType

from lowering import compat
from lowering.backend import serve_marks

_undo: list[Callable[[], None]] = []


class _Enabled:
    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        disable()


def enable() -> _Enabled:
    """Serve marks in every model that Inductor compiles from here on, without backend="simplex".

    The pass runs before Inductor looks into its caches, so what is cached is the rewritten graph.
    Works from the call on, or `with lowering.enable():` for a while; enabling twice is enabling
    once. Code compiled meanwhile stays as it was compiled.
    """
    if not _undo:
        compat.warn_if_untested()
        _undo.append(compat.wrap_compile_fx(serve_marks))
    return _Enabled()


def disable() -> None:
    """Undo `enable`; without it, nothing."""
    while _undo:
        _undo.pop()()
