"""The class of a marked module: derived from the one it had, with a forward in front."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from simplex_ops.marking import config_entry
from simplex_ops.marking.cached import SecondPair, put_into
from simplex_ops.marking.call import UnservedMarkError
from simplex_ops.marking.families.family import Family
from simplex_ops.marking.in_place_of_sdpa import InPlaceOfSdpa
from simplex_ops.marking.instance_forward import (
    call_watched,
    hides,
    marked_forward_runs,
    watched,
)
from simplex_ops.marking.mark_op import MARK_OP
from simplex_ops.marking.naming import described
from simplex_ops.marking.saved import SavedMark
from simplex_ops.marking.second import SecondNorm, SecondProjection
from simplex_ops.marking.setting import Mark
from simplex_ops.marking.watching import watching
from simplex_ops.marking.windows_in_graphs import as_scheduled, windows_of


class Marked(nn.Module):
    """What every marked module does, in front of the class it had."""

    simplex_base: type[nn.Module]
    simplex_family: Family
    simplex_arguments: tuple[str, ...]  # of the base's forward, those that positions can give
    simplex_takes_is_causal: bool  # whether the base's forward takes that argument
    simplex_mark: Mark
    simplex_k2: SecondProjection
    simplex_v2: SecondProjection
    simplex_k2_norm: SecondNorm | None  # where the module norms its keys
    simplex_ops: SavedMark

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):  # of a class derived later: it may never come to this one's
            cls.__call__ = watched(cls.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Marked):  # torch.compile(module) holds this method beyond unmark()
            return self(*args, **kwargs)
        # Compiled, a watch is a side effect, which a checkpoint around the module does not allow.
        if type(self).forward is not Marked.forward or (
            "forward" in self.__dict__
            and (not torch.compiler.is_compiling() or hides(self, Marked.forward))
        ):
            return call_watched(self, super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        marked_forward_runs(self)
        if (
            not torch.compiler.is_compiling() and watching()
        ):  # explain() asks what the module would call
            return super().forward(*args, **kwargs)
        given, x_name, mask_name, cache_name = self.simplex_family.bind(self, args, kwargs)
        x, mask = given[x_name], given.get(mask_name)
        pair, cache = SecondPair(*self.simplex_second_pair(x)), given.get(cache_name)
        setting, run = self.simplex_mark, self.simplex_family.run
        if cache is not None:
            pair = put_into(cache, self, setting, pair.k2, pair.v2)
        if pair.expected is not None and pair.expected.causal_by_mark:
            # Else transformers' attention takes a call without mask for one of an empty cache.
            given["is_causal"] = False
        # The mark takes the mask over: modules attend in other ways where they are given one.
        if mask is not None:
            given[mask_name] = None
        if torch.compiler.is_compiling() and not _is_run_to_export():
            w1, w2 = windows_of(setting)
            given[x_name] = MARK_OP(
                x, pair.k2, pair.v2, mask, w1, w2, pair.q_start,
                is_causal=setting.is_causal, form=setting.form,
                k2_bias=setting.k2_bias, v2_bias=setting.v2_bias,
                without_dropout=setting.without_dropout, **_of_a_cache(pair),
            )  # fmt: skip
            return run(self, super().forward, given)
        self.simplex_ops.notice()
        with InPlaceOfSdpa(self, setting, pair, mask) as taken:
            result = run(self, super().forward, given)
        taken.refuse_another()
        return result

    def simplex_second_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return k2 [B, Hkv, N, D] and v2 [B, Hkv, N, Dv] of an input [B, N, E]."""
        setting = self.simplex_mark
        k2 = self.simplex_k2(x).unflatten(-1, (-1, setting.head_dim))
        if self.simplex_k2_norm is not None:
            k2 = self.simplex_k2_norm(k2)
        v2 = self.simplex_v2(x).unflatten(-1, (-1, setting.v_head_dim))
        return k2.transpose(1, 2), v2.transpose(1, 2)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and not issubclass(value, Marked):
            raise UnservedMarkError(
                f"{described(self)} is marked, and as a {value.__name__} it would pass the mark "
                "by: unmark() it, change its class, then mark it again"
            )
        if isinstance(value, Mark) and name == "simplex_mark" and "simplex_ops" in self._modules:
            value = as_scheduled(self.simplex_ops.mark, value)
            self.simplex_ops.hold(value)
            config_entry.note(self, value)
        super().__setattr__(name, value)  # pyright: ignore[reportArgumentType]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so that pickle and deepcopy cannot find it by name.
        function, arguments, *state = super().__reduce_ex__(protocol)
        if not has_marked_class(self):
            return (function, arguments, *state)
        return (_blank, (self.simplex_base, self.simplex_family), *state)


def _of_a_cache(pair: SecondPair) -> dict[str, Any]:
    """Return what a mark says of a call with a cache."""
    if pair.expected is None:
        return {}
    keys, causal_by_mark = pair.expected.keys, pair.expected.causal_by_mark
    return {"keys": keys, "causal_by_mark": causal_by_mark}


def _is_run_to_export() -> bool:
    """Say whether torch.export runs this code as eager code runs it, by strict=False."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_marked(module: nn.Module) -> TypeGuard[Marked]:
    """Say whether a module is marked."""
    return isinstance(module, Marked)


def has_marked_class(module: nn.Module) -> bool:
    """Say whether a module's class is the one that marking made, and not one derived from it."""
    return "simplex_base" in vars(type(module))


def marked_class(base: type[nn.Module], family: Family) -> type[Marked]:
    """Return the class of marked modules that had the class `base`."""
    return _made(base, family, base.forward)


@functools.cache
def _made(base: type[nn.Module], family: Family, forward: Any) -> type[Marked]:
    parameters = inspect.signature(forward).parameters.values()
    names = tuple(
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )
    space = {
        "__module__": __name__,
        "simplex_base": base,
        "simplex_family": family,
        "simplex_arguments": names[1:],
        "simplex_takes_is_causal": takes_is_causal(parameters),
    }
    if base.__call__ is not nn.Module.__call__:
        space["__call__"] = _through(base)
    return type(f"Simplex{base.__name__}", (Marked, base), space)


def _through(base: type[nn.Module]) -> Callable[..., Any]:
    """Return the `__call__` of a class that has one of its own, for `Marked` to watch."""

    @functools.wraps(base.__call__)
    def call(self: Marked, *args: Any, **kwargs: Any) -> Any:
        return Marked.__call__(self, *args, **kwargs)

    return call


def takes_is_causal(parameters: Iterable[inspect.Parameter]) -> bool:
    """Say whether a forward of these parameters can be told is_causal."""
    return any(p.kind is p.VAR_KEYWORD or p.name == "is_causal" for p in parameters)


def _blank(base: type[nn.Module], family: Family) -> Marked:
    cls = marked_class(base, family)
    return cls.__new__(cls)
