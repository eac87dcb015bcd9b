"""enable() and disable(): the pass for every torch.compile(model) that ends in Inductor."""

from types import TracebackType

from torch import fx

from lowering import compat
from lowering.backend import serve_marks
from simplex_ops.marking.windows_in_graphs import constant_windows


class _Switch:
    """Whether the pass runs: called for, or within a `with`, of which several may stand at once."""

    def __init__(self) -> None:
        self.called_for = False
        self.blocks = 0

    @property
    def on(self) -> bool:
        return self.called_for or self.blocks > 0

    def set(self, *, called_for: bool | None = None, more_blocks: int = 0) -> None:
        self.called_for = self.called_for if called_for is None else called_for
        self.blocks += more_blocks
        if self.on:
            compat.warn_if_untested()
            compat.wrap_entries(_serve_where_on, constant_windows)
        else:
            compat.unwrap_entries()


_SWITCH = _Switch()


def _serve_where_on(gm: fx.GraphModule) -> None:
    if _SWITCH.on:
        serve_marks(gm)


class _Enabled:
    """What enable() returns: as a `with`, it stands for the block alone."""

    def __init__(self, before: bool) -> None:
        self._before = before
        self._after: list[bool] = []

    def __enter__(self) -> None:
        self._after.append(self._before and _SWITCH.called_for)
        _SWITCH.set(called_for=self._after[-1], more_blocks=1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _SWITCH.set(called_for=self._after.pop(), more_blocks=-1)


def enable() -> _Enabled:
    """Serve marks in every model that Inductor compiles from here on, without backend="simplex".

    The pass runs before Inductor looks into its caches, so what is cached is the rewritten graph.
    `torch.export.export(model, ..., strict=True)` is served too.
    Works from the call on, until `disable()`; called twice it is enabled once. `with
    simplex_ops.enable():` is for the block alone, whatever stood before it stands after it, and
    blocks may be nested. The model must be called in the block, since it is compiled when it is
    called and not by torch.compile(model). Code compiled meanwhile stays as it was compiled.
    """
    before = _SWITCH.called_for
    _SWITCH.set(called_for=True)
    return _Enabled(before)


def disable() -> None:
    """Undo `enable()`; without it, nothing. A `with` that stands ends with its own block."""
    _SWITCH.set(called_for=False)
