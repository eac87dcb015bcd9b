"""explain(): what would become of each attention module of a model, before anything is compiled."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from simplex_ops.marking.cached import expected_of
from simplex_ops.marking.call import (
    SDPA,
    Expected,
    Refusal,
    SdpaCall,
    UnservedMarkError,
    refusal,
    with_mask,
)
from simplex_ops.marking.families.family import Family
from simplex_ops.marking.families.known import family_of
from simplex_ops.marking.marked import is_marked, takes_is_causal
from simplex_ops.marking.models import attention_modules
from simplex_ops.marking.multi_head import named, refuse_unserved, spelled_out
from simplex_ops.marking.ranges import RANGES_OP
from simplex_ops.marking.unrepeated import Unrepeated
from simplex_ops.marking.watching import watch


@dataclass
class Explained:
    """One attention module: `served` is None where it was not asked, for want of an example."""

    name: str
    kind: str
    marked: bool
    served: bool | None
    why: str = ""
    remedy: str = ""


@dataclass
class Explanation:
    """The table of all attention modules of a model."""

    rows: list[Explained] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.rows:
            return "no attention module was found"
        titles = ("module", "class", "mark", "served", "why", "remedy")
        answers = {True: "served", False: "refused", None: "not run"}
        cells = [
            (r.name, r.kind, "marked" if r.marked else "", answers[r.served], r.why, r.remedy)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        return "\n".join(
            " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in (titles, *cells)
        )


def explain(model: nn.Module, *example: Any, **named_example: Any) -> Explanation:
    """Say of each attention module whether it is served or refused, why, and what to do.

    Of a marked module as it is marked, of any other as `mark` would with its defaults. The model is
    run once in eager code on the example, without gradients and without its marks, and each
    module's calls of attention are looked at; without an example only the modules are. Print the
    result, or read its `rows`. What only a compiled graph shows, such as a mask that eager code
    leaves out, is not seen here. What the model raises on the example is raised. A key-value cache
    among the example is filled by the run, with keys alone: it serves no marked model afterwards.
    """
    watched = [_Watched.of(name, module) for name, module in attention_modules(model)]
    if example or named_example:
        by_module = {id(w.module): w for w in watched if w.reading is not None}
        with ExitStack() as stack, torch.no_grad(), watch():
            for one in by_module.values():
                stack.enter_context(one.running())
            stack.enter_context(_Calls(watched))
            model(*example, **named_example)
        for one in watched:
            one.conclude()
    return Explanation([one.said for one in watched])


class _Watched:
    """One module while the model runs."""

    def __init__(self, module: nn.Module, said: Explained, reading: Any) -> None:
        self.module, self.said, self.reading = module, said, reading
        self.depth = self.runs = self.calls = 0
        self.rows: tuple[int, int] = (0, 0)  # batch and tokens of its input
        self.mask: Any = None  # of the call that runs, which a mark takes over
        self.expected: Expected | None = None  # of that call, by its key-value cache
        self.refused: tuple[str, str] | None = None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "_Watched":
        marked = is_marked(module)
        kind = (module.simplex_base if is_marked(module) else type(module)).__name__
        said = Explained(name, kind, marked, None)
        if is_marked(module):
            return cls(module, said, (module.simplex_family, None))
        try:
            return cls(module, said, family_of(module))
        except TypeError as error:
            said.served = False
            why, _, remedy = str(error).partition(". Where it is one, ")
            said.why, said.remedy = why, remedy
            return cls(module, said, None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note when the module runs."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self.depth += 1
            self.runs += 1
            return self._bind(args, kwargs)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.depth -= 1

        hooks = (
            self.module.register_forward_pre_hook(enter, with_kwargs=True),
            self.module.register_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _bind(self, args: Any, kwargs: Any) -> Any:
        """Look at a call's arguments, and return them as a mark would give them."""
        self.mask = self.expected = None
        family: Family = self.reading[0]
        try:
            own = _Named(self.module)
            bound = family.bind(own, args, kwargs)  # pyright: ignore[reportArgumentType]
        except UnservedMarkError as error:
            self._refuse(*_split(str(error).partition("cannot run: ")[2] or str(error)))
            return None
        except TypeError:
            return None  # the module's own forward will say so
        x = bound.arguments[bound.x]
        self.rows = (x.shape[0], x.shape[1])
        self._expect(bound.arguments.get(bound.cache), own)
        changed: dict[str, Any] = {}
        if bound.arguments.get(bound.mask) is not None:
            changed[bound.mask] = None
        if self.expected is not None and self.expected.causal_by_mark:
            changed["is_causal"] = False
        if not changed or not set(bound.arguments) <= {*own.simplex_arguments, *kwargs}:
            return None
        self.mask = bound.arguments.get(bound.mask)
        return (), {**bound.arguments, **changed}

    def _expect(self, cache: Any, own: "_Named") -> None:
        """Ask what a cache would have a call be."""
        if cache is None:
            return
        is_causal, w2 = bool(getattr(self.module, "is_causal", True)), 32
        if is_marked(self.module):
            is_causal, w2 = self.module.simplex_mark.is_causal, self.module.simplex_mark.w2
        found = expected_of(cache, own, is_causal, w2, self.rows[1])  # pyright: ignore[reportArgumentType]
        if isinstance(found, Refusal):
            self._refuse(*found)
        else:
            self.expected = found

    def look_at(self, call: SdpaCall, unrepeated: Unrepeated) -> None:
        """Ask of a call of attention inside the module whether a mark can take it over."""
        self.calls += 1
        call, found = with_mask(call, self.mask)
        reading = self.reading[1]
        if is_marked(self.module):
            mark = self.module.simplex_mark
            sizes, is_causal = (mark.kv_heads, mark.head_dim), mark.is_causal
            without = mark.without_dropout
        else:
            sizes = (reading.kv_heads, reading.head_dim)
            is_causal, without = bool(getattr(self.module, "is_causal", True)), False
        batch, tokens = self.rows
        k2 = torch.empty((batch, sizes[0], tokens, sizes[1]), device="meta")
        call = unrepeated.folded(call, sizes[0])
        found = found or refusal(call, k2, is_causal, without, self.expected)
        if found is not None:
            self._refuse(*found)
        elif call.attn_mask is not None:
            q, keys = call.query, call.key.shape[2]
            try:
                RANGES_OP(call.attn_mask, q.shape[0], q.shape[2], keys, is_causal=is_causal)
            except UnservedMarkError as error:
                self._refuse(*_split(str(error)))

    def _refuse(self, why: str, remedy: str) -> None:
        self.refused = self.refused or (why, remedy)

    def conclude(self) -> None:
        """Say what was found."""
        said = self.said
        if self.reading is None:
            return
        if not self.runs:
            said.why, said.remedy = "the example does not run it", "give an example that does"
            return
        if self.refused is None and self.calls != self.runs:
            self._refuse(
                f"it called scaled_dot_product_attention {self.calls} times in {self.runs} runs, "
                "and a mark takes over exactly one call",
                'load the model with attn_implementation="sdpa", or compile it',
            )
        said.served = self.refused is None
        if self.refused is not None:
            said.why, said.remedy = self.refused


class _Calls(TorchFunctionMode):
    """Shows calls of attention to the innermost watched module that runs."""

    def __init__(self, watched: list[_Watched]) -> None:
        super().__init__()
        self.watched = watched
        self.unrepeated = Unrepeated()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = [w for w in self.watched if w.depth]
        if inside and func is SDPA:
            inside[-1].look_at(SdpaCall.bind(args, kwargs), self.unrepeated)
        if inside and func is F.multi_head_attention_forward:
            try:
                refuse_unserved(named(*args, **kwargs), inside[-1].said.name)
            except UnservedMarkError as error:
                inside[-1]._refuse(*_split(str(error).partition("cannot run: ")[2]))
            else:
                with self:
                    return spelled_out(*args, **kwargs)
        out = func(*args, **kwargs)
        if inside:
            self.unrepeated.note(func, args, kwargs, out)
        return out


class _Named:
    """A module as a family's bind() reads it: with the names of its forward's arguments."""

    def __init__(self, module: nn.Module) -> None:
        base = module.simplex_base if is_marked(module) else type(module)
        parameters = list(inspect.signature(base.forward).parameters.values())[1:]
        by_position = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        self.simplex_arguments = tuple(p.name for p in parameters if p.kind in by_position)
        self.simplex_takes_is_causal = takes_is_causal(parameters)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _split(text: str) -> tuple[str, str]:
    why, _, remedy = text.partition(": ")
    return why, remedy
