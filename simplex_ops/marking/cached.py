"""What a marked module attends with where it is given a key-value cache."""

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from simplex_ops.marking.call import Expected, Refusal, UnservedMarkError
from simplex_ops.marking.naming import running_as
from simplex_ops.marking.setting import Mark

if TYPE_CHECKING:
    from simplex_ops.marking.cache_layers import HoldingLayer

_WITHOUT = "call the model with use_cache=False"
_KINDS = f"give a DynamicCache or a StaticCache, neither offloaded nor quantised; or {_WITHOUT}"
_FROM_THE_START = (
    "let the marked model fill a cache from the start (a new cache for each sequence, changed by "
    f"its own methods alone), or {_WITHOUT}"
)


class SecondPair(NamedTuple):
    """k2 and v2 that a call attends to, those that a cache holds included."""

    k2: Tensor  # [B, Hkv, R, D]
    v2: Tensor  # [B, Hkv, R, Dv]
    q_start: Tensor | None = None
    expected: Expected | None = None  # None without a cache


def put_into(cache: Any, module: nn.Module, setting: Mark, k2: Tensor, v2: Tensor) -> SecondPair:
    """Put the second pair of a call into the cache that its module was given.

    Raises:
        UnservedMarkError: the cache cannot be served.
    """
    layer = _layer_of(cache, module, setting.is_causal, setting.w2)
    if isinstance(layer, Refusal):
        raise UnservedMarkError(f"a marked module, {running_as(module)}, cannot run: {layer}")
    if layer is None:
        return SecondPair(k2, v2)
    expected = _expected(layer, module, k2.shape[2])
    k2, v2, q_start = layer.simplex_put(k2, v2, setting.w2)
    return SecondPair(k2, v2, q_start, expected)


def expected_of(
    cache: Any, module: nn.Module, is_causal: bool, w2: int | None, tokens: int
) -> Expected | Refusal | None:
    """Return what `put_into` would expect of a call, or why it would raise; it puts nothing."""
    layer = _layer_of(cache, module, is_causal, w2)
    if layer is None or isinstance(layer, Refusal):
        return layer
    return _expected(layer, module, tokens)


def _expected(layer: "HoldingLayer", module: nn.Module, tokens: int) -> Expected:
    told = tokens > 1 and bool(getattr(module, "simplex_takes_is_causal", False))
    return Expected(tokens, layer.get_mask_sizes(tokens)[0], told)


def _layer_of(
    cache: Any, module: nn.Module, is_causal: bool, w2: int | None
) -> "HoldingLayer | Refusal | None":
    """Return the layer that holds a module's keys; None where nothing need be held."""
    try:
        from transformers.cache_utils import Cache

        from simplex_ops.marking.cache_layers import HoldingStaticLayer, holding_layer
    except ImportError:
        return Refusal(f"marks do not know its cache, a {type(cache).__name__}", _KINDS)
    own = getattr(cache, "self_attention_cache", cache)
    if not isinstance(own, Cache) or own.offloading:
        how = "that offloads its layers" if isinstance(own, Cache) else ""
        return Refusal(f"marks do not know its cache, a {type(own).__name__} {how}".strip(), _KINDS)
    # Read here and not before: a guard on layer_idx would compile every layer anew.
    index = getattr(module, "layer_idx", 0)
    layer = holding_layer(own, index)
    if layer is None:
        kind = type(own.layers[index]).__name__
        return Refusal(f"marks do not know the layers of its cache, a {kind}", _KINDS)
    if not is_causal:
        if not isinstance(layer, HoldingStaticLayer) and layer.get_seq_length() == 0:
            return None
        return Refusal(
            "it was marked with is_causal=False, and a cache that holds keys already lets no "
            "earlier query see later keys",
            _WITHOUT,
        )
    if layer.simplex_lacks(w2):
        return Refusal(
            "its key-value cache holds keys already, and does not hold their k2 and v2",
            _FROM_THE_START,
        )
    return layer
