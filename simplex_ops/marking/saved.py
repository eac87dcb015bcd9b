"""A mark's settings as a tensor in the state dict: how a mark travels with its model.

The tensor is small and of integers, so that it survives `.to(dtype)`, safetensors, distributed
checkpoints and averages of weights. Its name in a state dict ends in `simplex_ops.mark_like`: who
loads it into a model without that mark is told by PyTorch and by transformers of a key they did not
expect, and the key says which call to make.

Private names: torch._C._functorch's is_batchedtensor, get_unwrapped and maybe_get_bdim, seen in
2.11 to 2.15: a tensor that vmap made of several models' settings.
"""

import struct
from typing import Any

import torch
from torch import Tensor, nn

from simplex_ops.contract.checks import FORMS
from simplex_ops.marking.setting import INITS, Mark

CHILD = "simplex_ops"
KEY = "mark_like"
SUFFIX = f".{CHILD}.{KEY}"

_VERSION = 1
_BASE = 2**20  # a digit is exact in float32 too, in which some average integers
_LENGTH = 20


class SavedMark(nn.Module):
    """Holds the settings of a module's mark as a tensor, and compares what is loaded with them."""

    mark_like: Tensor

    def __init__(self, mark: Mark, device: torch.device) -> None:
        super().__init__()
        self.mark = mark
        self.register_buffer(KEY, encoded(mark, device))

    def hold(self, mark: Mark) -> None:
        """Take the settings of another mark."""
        self.mark = mark
        self._write()

    def notice(self) -> None:
        """Raise where someone put other settings into the tensor past all that loads.

        Raises:
            ValueError: saying both settings and the call that marks like the loaded ones.
        """
        now = self._buffers[KEY]
        if torch.compiler.is_compiling():  # torch.export runs eager code too, on no numbers
            return
        if now is None:
            return
        now, stacked = _unstacked(now)
        if now is self.__dict__.get("_compared") or now.is_meta:
            return
        text = difference(self.mark, now) if stacked is None else _differs(self.mark, stacked)
        if text is not None:
            raise ValueError(text)
        self.__dict__["_compared"] = now

    def extra_repr(self) -> str:
        """Return the settings."""
        return told(self.mark)

    def _write(self) -> None:
        now = self._buffers[KEY]
        assert now is not None
        self._buffers[KEY] = self.__dict__["_compared"] = encoded(self.mark, now.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._write()  # leaving the meta device it would be whatever was in memory
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loaded = state_dict.get(prefix + KEY)
        if loaded is None:
            if strict:
                missing_keys.append(prefix + KEY)
            return
        text = difference(self.mark, loaded)
        if text is not None:
            error_msgs.append(f"{prefix}{KEY}: {text}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == KEY and isinstance(value, Tensor) and not value.is_meta:
            # transformers loads so; a tensor that it does not call initialised came from nowhere.
            if getattr(value, "_is_hf_initialized", False):
                text = difference(self.mark, value)
                if text is not None:
                    raise ValueError(text)
            value = encoded(self.mark, value.device)
            value._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
            self.__dict__["_compared"] = value
        super().__setattr__(name, value)


def _unstacked(saved: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what vmap made a tensor of, and the settings there [models, 20]; else itself."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    rows = saved
    while functorch.is_batchedtensor(rows):
        dim = functorch.maybe_get_bdim(rows)
        rows, saved = functorch.get_unwrapped(rows).movedim(dim, 0), functorch.get_unwrapped(saved)
    return saved, None if rows.dim() < 2 else rows.flatten(0, -2)


def _differs(mark: Mark, stacked: Tensor) -> str | None:
    """Return how settings of models that vmap stacks differ from the mark that runs them."""
    for number, saved in enumerate(stacked.cpu()):
        if difference(mark, saved) is not None:
            return (
                f"model {number} of those that vmap stacks is marked with {told(decoded(saved))}, "
                f"and the module that is called for all with {told(mark)}: stack models that are "
                "marked alike, and call one of them"
            )
    return None


def encoded(mark: Mark, device: torch.device) -> Tensor:
    """Return a mark as integers [20]; `decoded` is the inverse."""
    numbers = [
        _VERSION,
        INITS.index(mark.init),
        FORMS.index(mark.form),
        int(mark.is_causal),
        int(mark.without_dropout),
        mark.head_dim,
        mark.v_head_dim,
        mark.kv_heads,
    ]
    for window in (mark.w1, mark.w2):
        numbers += divmod(0 if window is None else window, _BASE)
    for bias in (mark.k2_bias, mark.v2_bias):
        numbers += struct.unpack("<4H", struct.pack("<d", bias))
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def decoded(saved: Tensor) -> Mark:
    """Return the mark that a tensor of settings holds.

    Raises:
        ValueError: it is no such tensor, or of a later release.
    """
    numbers = saved.detach().cpu().tolist() if saved.dim() == 1 else []
    if len(numbers) != _LENGTH or numbers[0] != _VERSION:
        raise ValueError(
            f"a tensor of a mark's settings must hold {_LENGTH} integers of version {_VERSION}, "
            f"got shape {tuple(saved.shape)} and version {numbers[:1]}: was it saved by a later "
            "release of simplex-ops, or written over?"
        )
    _, init, form, is_causal, without_dropout, head_dim, v_head_dim, kv_heads, *rest = map(
        int, numbers
    )
    w1, w2 = (high * _BASE + low or None for high, low in (rest[:2], rest[2:4]))
    k2_bias, v2_bias = (
        struct.unpack("<d", struct.pack("<4H", *digits))[0] for digits in (rest[4:8], rest[8:12])
    )
    return Mark(
        w1, w2, FORMS[form], k2_bias, v2_bias, bool(is_causal), head_dim, v_head_dim,
        bool(without_dropout), INITS[init], kv_heads,
    )  # fmt: skip


def difference(mark: Mark, loaded: Tensor) -> str | None:
    """Return how loaded settings differ from a mark and what to do; None where they do not."""
    if loaded.is_meta:
        return None
    try:
        saved = decoded(loaded)
    except ValueError as error:
        return str(error)
    if told(saved) == told(mark):
        return None
    return (
        f"it was saved by a module marked with {told(saved)}, and is loaded into one marked with "
        f"{told(mark)}. Mark like it before loading: simplex_ops.mark_like(model, state_dict) on "
        "the unmarked model, or simplex_ops.from_pretrained(...) for transformers. To change a "
        "mark on purpose, load first and replace module.simplex_mark then"
    )


def told(mark: Mark) -> str:
    """Return the settings as the arguments of mark() that say them."""
    parts = [
        f"window=({mark.w1}, {mark.w2})",
        f'form="{mark.form}"',
        f"k2_bias={mark.k2_bias}",
        f"v2_bias={mark.v2_bias}",
        f"is_causal={mark.is_causal}",
    ]
    if mark.without_dropout:
        parts.append("attention_dropout=0.0")
    return ", ".join(parts)
