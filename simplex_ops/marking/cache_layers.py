"""Layers of Hugging Face's caches that hold k2 and v2 beside keys and values.

Whoever reorders, crops, repeats, selects or resets a cache calls its layers, so the second pair
goes where the first one goes. A dynamic layer grows: of k2 and v2 it keeps what is within w2 of the
next query, SLACK rows more, and all rows of the last call. A static layer holds them at its full
length, which is that of its sliding window where it has one.

This module imports transformers, so it is imported where a cache has come.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from simplex_ops.marking.call import UnservedMarkError

SLACK = 128

_NOT_EMPTY = (
    "simplex: a static cache that holds keys already does not hold their k2 and v2: reset() it, or "
    "give a new cache"
)


class HoldingLayer(CacheLayerMixin):
    """What every layer that holds k2 [B, Hkv, R, D] and v2 [B, Hkv, R, Dv] does."""

    simplex_takes: tuple[str, ...] = ()  # attributes of the layer in whose place it comes
    simplex_k2: Tensor | None = None
    simplex_v2: Tensor | None = None

    def simplex_lacks(self, w2: int | None) -> bool:
        """Say whether k2 and v2 are missing that the next query may see through w2."""
        raise NotImplementedError

    def simplex_put(
        self, k2: Tensor, v2: Tensor, w2: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in the rows of a call, before its keys come.

        Return k2, v2 and q_start as simplex::attn takes them together with the layer's keys.
        """
        raise NotImplementedError

    def simplex_forget(self) -> None:
        """Hold nothing."""
        self.simplex_k2 = self.simplex_v2 = None

    def reset(self) -> None:
        super().reset()
        self.simplex_forget()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.simplex_change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def simplex_change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held."""
        if self.simplex_k2 is not None and self.simplex_v2 is not None:
            self.simplex_k2, self.simplex_v2 = change(self.simplex_k2), change(self.simplex_v2)


class HoldingDynamicLayer(HoldingLayer, DynamicLayer):
    """A DynamicLayer, the last of whose rows have a k2 and v2."""

    simplex_takes = ("keys", "values", "is_initialized", "dtype", "device")
    simplex_seen = 0  # tokens of which k2 and v2 came: all that the layer has seen
    simplex_reach: int | None = None  # rows that the last w2 reaches back; None is all

    def simplex_lacks(self, w2: int | None) -> bool:
        held = 0 if self.simplex_k2 is None else self.simplex_k2.shape[2]
        seen = self.get_seq_length()
        if seen != self.simplex_seen:
            return True
        return held < seen and (w2 is None or held < w2 - 1)

    def simplex_put(
        self, k2: Tensor, v2: Tensor, w2: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        reach, tokens = None if w2 is None else w2 - 1, k2.shape[2]
        keys = self.get_mask_sizes(tokens)[0]
        if self.simplex_k2 is not None and self.simplex_v2 is not None:
            excess = 0 if reach is None else self.simplex_k2.shape[2] - (reach + SLACK)
            if excess > 0:
                self.simplex_change(lambda rows: rows[:, :, excess:])
            k2 = torch.cat((self.simplex_k2, k2), 2)
            v2 = torch.cat((self.simplex_v2, v2), 2)
        self.simplex_k2, self.simplex_v2, self.simplex_reach = k2, v2, reach
        self.simplex_seen = self.get_seq_length() + tokens
        if self.is_sliding and k2.shape[2] > keys:  # its own window hides the rest from both pairs
            k2, v2 = (rows[:, :, k2.shape[2] - keys :] for rows in (k2, v2))
        return k2, v2, None

    def simplex_forget(self) -> None:
        super().simplex_forget()
        self.simplex_seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        seen = self.get_seq_length()
        if seen == before or self.simplex_k2 is None:
            return
        left = self.simplex_k2.shape[2] - (before - seen)
        if left < seen and (self.simplex_reach is None or left < self.simplex_reach):
            self.simplex_forget()
            raise UnservedMarkError(
                f"a key-value cache was cropped by {before - seen} tokens, and of k2 and v2 it "
                f"keeps w2 - 1 rows, {SLACK} more and those of the last call: crop less at a time, "
                "or fill a new cache"
            )
        self.simplex_change(lambda rows: rows[:, :, :left])
        self.simplex_seen = seen

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.simplex_change(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.simplex_change(lambda rows: rows[indices])


class HoldingSlidingLayer(HoldingDynamicLayer, DynamicSlidingWindowLayer):
    """A DynamicSlidingWindowLayer, which lets keys go, with k2 and v2 by their own window."""

    simplex_takes = (
        *HoldingDynamicLayer.simplex_takes,
        "sliding_window",
        "cumulative_length",
        "_sliding_window_tensor",
        "record_past",
    )


class HoldingStaticLayer(HoldingLayer, StaticLayer):
    """A StaticLayer with buffers of k2 and v2; row r is key position r in both pairs."""

    simplex_takes = (
        "keys",
        "values",
        "is_initialized",
        "dtype",
        "device",
        "max_cache_len",
        "cumulative_length",
        "batch_size",
        "num_heads",
        "k_head_dim",
        "v_head_dim",
    )
    simplex_awaits_keys = False
    simplex_missed = False  # keys came whose k2 and v2 did not

    def simplex_lacks(self, w2: int | None) -> bool:
        if self.simplex_k2 is not None or not self.is_initialized:
            return self.simplex_missed
        if not torch.compiler.is_compiling():
            return int(self.cumulative_length) != 0  # waits for the device, once for a cache
        torch._assert_async(self.cumulative_length == 0, _NOT_EMPTY)
        return False

    def simplex_put(
        self, k2: Tensor, v2: Tensor, w2: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        held = self.simplex_buffers(k2, v2)
        start = self.cumulative_length.to(k2.device)
        places = torch.arange(k2.shape[2], device=k2.device) + start
        for rows, new in zip(held, (k2, v2), strict=True):
            rows.index_copy_(2, places, new)
        self.simplex_awaits_keys = True
        q_start = start.to(torch.int32).expand(k2.shape[0]).contiguous()
        return *held, q_start

    def simplex_buffers(self, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
        """Return what holds the rows of both, made when the first come."""
        if self.simplex_k2 is None or self.simplex_v2 is None:
            self.simplex_k2, self.simplex_v2 = (
                rows.new_zeros((*rows.shape[:2], self.max_cache_len, rows.shape[3]))
                for rows in (k2, v2)
            )
            if not torch.compiler.is_compiling():  # as transformers does, for CUDA graphs
                torch._dynamo.mark_static_address(self.simplex_k2)
                torch._dynamo.mark_static_address(self.simplex_v2)
        return self.simplex_k2, self.simplex_v2

    def simplex_forget(self) -> None:
        # The buffers stay where they are: compiled code knows their addresses.
        if self.simplex_k2 is not None and self.simplex_v2 is not None:
            self.simplex_k2.zero_()
            self.simplex_v2.zero_()
        self.simplex_awaits_keys = self.simplex_missed = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.simplex_awaits_keys:
            self.simplex_missed = True
        self.simplex_awaits_keys = False
        return super().update(key_states, value_states, *args, **kwargs)


class HoldingStaticSlidingLayer(HoldingStaticLayer, StaticSlidingWindowLayer):
    """A StaticSlidingWindowLayer: what does not fit rolls out of both pairs alike.

    Its keys then end at the last query, and so do k2 and v2.
    """

    simplex_takes = (*HoldingStaticLayer.simplex_takes, "cumulative_length_int")

    def simplex_lacks(self, w2: int | None) -> bool:
        if self.simplex_k2 is not None or not self.is_initialized:
            return self.simplex_missed
        return self.cumulative_length_int != 0

    def simplex_put(
        self, k2: Tensor, v2: Tensor, w2: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        seen, length = self.cumulative_length_int, self.max_cache_len
        if seen + k2.shape[2] <= length:
            return super().simplex_put(k2, v2, w2)
        first, last = (0, seen) if seen < length else (1, length)
        held = self.simplex_buffers(k2, v2)
        whole = [
            torch.cat((rows[:, :, first:last], new), 2)
            for rows, new in zip(held, (k2, v2), strict=True)
        ]
        for rows, new in zip(held, whole, strict=True):
            rows.copy_(new[:, :, -length:])
        self.simplex_awaits_keys = True
        return whole[0], whole[1], None


_HOLDING: dict[type, type[HoldingLayer]] = {
    DynamicLayer: HoldingDynamicLayer,
    DynamicSlidingWindowLayer: HoldingSlidingLayer,
    StaticLayer: HoldingStaticLayer,
    StaticSlidingWindowLayer: HoldingStaticSlidingLayer,
}


def holding_layer(cache: Any, index: int) -> HoldingLayer | None:
    """Return a cache's layer, made one that holds k2 and v2; None where its kind is not known.

    torch.compile traces it, so a new object takes the layer's place: it knows no change of class.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, HoldingLayer):
        return layer
    kind = _HOLDING.get(type(layer))
    if kind is None:
        return None
    holding = kind.__new__(kind)
    if torch.compiler.is_compiling():
        for name in kind.simplex_takes:
            if hasattr(layer, name):
                setattr(holding, name, getattr(layer, name))
    else:
        vars(holding).update(vars(layer))
    cache.layers[index] = holding
    return holding
