"""Marking: turn an attention module of an existing model into 2-simplicial attention, in place."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from simplex_ops.contract.checks import FORMS
from simplex_ops.marking.call import SDPA, SdpaCall, UnservedMarkError, refusal
from simplex_ops.marking.families.llama import projections_of
from simplex_ops.marking.mark_op import MARK_OP

# (k2_bias, v2_bias) under which zero projections leave ordinary attention through w1.
_RESIDUAL_BIASES = {"trilinear": (1.0, 1.0), "strassen": (0.0, 1.0)}


@dataclass(frozen=True)
class Mark:
    """How a marked module attends: those arguments of simplex::attn that its input does not give.

    It stands on the module as `simplex_mark`; to change a window, put another there
    (`dataclasses.replace`): compiled code notices and compiles again.
    """

    w1: int | None
    w2: int | None
    form: str
    k2_bias: float
    v2_bias: float
    is_causal: bool
    head_dim: int
    v_head_dim: int


def mark(
    module: nn.Module,
    *,
    window: tuple[int | None, int | None] = (512, 32),
    form: str = "trilinear",
    k2_bias: float | None = None,
    v2_bias: float | None = None,
    init: str = "residual",
    is_causal: bool | None = None,
) -> nn.Module:
    """Make an attention module 2-simplicial, in place, and return it.

    The module keeps its class's forward, its weights and its name in the model, and gets two linear
    layers, `simplex_k2` and `simplex_v2`, that make k2 and v2 from its input as its k_proj and
    v_proj make keys and values. Where its forward calls `F.scaled_dot_product_attention(q, k, v)`,

        simplex::attn(q, k, k2, v, v2, w1, w2, scale=..., form=..., k2_bias=..., v2_bias=...)

    runs instead, eager and compiled alike; compiled, by the pass of backend="simplex" or
    `lowering.enable()`. Mark a model before an optimizer takes its parameters, and before a state
    dict with k2 and v2 is loaded.

    Rotary embeddings stay where the module puts them, on q and k (k1); k2 and v2 get none. The
    trilinear and strassen forms are not invariant under a rotation of all three, and with k2 = 1
    the rotated q and k1 leave the model's own attention.

    Args:
        module: the attention module: shaped as Hugging Face's LlamaAttention (`projections`).
        window: (w1, w2) in keys, the query's own position included; None is unbounded.
        form: "trilinear", "determinant" or "strassen".
        k2_bias: added to k2 inside the operator; None is 0, but 1 where init is "residual" and the
            form is trilinear.
        v2_bias: added to v2 inside the operator; None is 0, but 1 where init is "residual".
        init: "residual" starts from zero projections, so that with the default biases the module
            starts as ordinary attention through w1; "random" as nn.Linear starts.
        is_causal: None takes the module's own `is_causal`, True where it has none.

    Raises:
        TypeError: the module is not of a shape that marking knows; the message says what it lacks.
        ValueError: it is marked already, or a window, form or init is not one of the above.
    """
    if is_marked(module):
        raise ValueError(
            f"{type(module).__name__} is marked already: unmark() it, or replace its simplex_mark"
        )
    w1, w2 = (_checked_window(name, w) for name, w in zip(("w1", "w2"), window, strict=True))
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    defaults = _default_biases(init, form)
    found = projections_of(module)
    setting = Mark(
        w1,
        w2,
        form,
        defaults[0] if k2_bias is None else float(k2_bias),
        defaults[1] if v2_bias is None else float(v2_bias),
        bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
        found.head_dim,
        found.v_head_dim,
    )
    for name, width in (("simplex_k2", found.head_dim), ("simplex_v2", found.v_head_dim)):
        module.add_module(name, _projection(found.like, found.kv_heads * width, init))
    module.simplex_mark = setting  # pyright: ignore[reportArgumentType]
    module.__class__ = _marked_class(type(module))
    return module


def unmark(module: nn.Module) -> nn.Module:
    """Give a marked module its own attention back, drop its k2 and v2, and return it.

    Raises:
        ValueError: the module is not marked.
    """
    if not is_marked(module):
        raise ValueError(f"{type(module).__name__} is not marked")
    del module.simplex_k2, module.simplex_v2, module.simplex_mark
    module.__class__ = module.simplex_base  # pyright: ignore[reportAttributeAccessIssue]
    return module


def is_marked(module: nn.Module) -> TypeGuard["_Marked"]:
    """Say whether a module is marked."""
    return isinstance(module, _Marked)


def marked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the marked modules of a model by name."""
    return {name: module for name, module in model.named_modules() if is_marked(module)}


class _Marked(nn.Module):
    """The forward of every marked module, in front of the class it had."""

    simplex_base: type[nn.Module]
    simplex_arguments: tuple[str, ...]
    simplex_mark: Mark
    simplex_k2: nn.Linear
    simplex_v2: nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.simplex_arguments, args, strict=False)), **kwargs}
        x, mask = given["hidden_states"], given.get("attention_mask")
        _refuse_filled_cache(self, given.get("past_key_values"))
        setting = self.simplex_mark
        k2 = self.simplex_k2(x).unflatten(-1, (-1, setting.head_dim)).transpose(1, 2)
        v2 = self.simplex_v2(x).unflatten(-1, (-1, setting.v_head_dim)).transpose(1, 2)
        if torch.compiler.is_compiling():
            # A compiled model may materialise the causal mask that eager code leaves out; the mark
            # carries it to the pass, which proves that it is no more than causal, or refuses.
            if mask is not None:
                given["attention_mask"] = None
            given["hidden_states"] = MARK_OP(
                x, k2, v2, mask, setting.w1, setting.w2,
                is_causal=setting.is_causal, form=setting.form,
                k2_bias=setting.k2_bias, v2_bias=setting.v2_bias,
            )  # fmt: skip
            return super().forward(**given)
        with _InPlaceOfSdpa(setting, k2, v2) as taken:
            result = super().forward(**given)
        if taken.calls != 1:
            raise UnservedMarkError(
                f"a marked {self.simplex_base.__name__} called scaled_dot_product_attention "
                f"{taken.calls} times in one forward, and a mark takes over exactly one call: "
                'load the model with attn_implementation="sdpa"'
            )
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so that pickle and deepcopy cannot find it by name.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank, (self.simplex_base,), *state)


class _InPlaceOfSdpa(TorchFunctionMode):
    """Runs simplex::attn where scaled_dot_product_attention is called, and counts the calls."""

    def __init__(self, setting: Mark, k2: Tensor, v2: Tensor) -> None:
        super().__init__()
        self.setting, self.k2, self.v2 = setting, k2, v2
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        call, setting = SdpaCall.bind(args, kwargs or {}), self.setting
        reason = refusal(call, self.k2, setting.is_causal)
        if reason is not None:
            raise UnservedMarkError(f"a marked module cannot run: {reason}")
        out, _ = torch.ops.simplex.attn(
            call.query, call.key, self.k2, call.value, self.v2, setting.w1, setting.w2,
            scale=call.scale, is_causal=setting.is_causal, form=setting.form,
            k2_bias=setting.k2_bias, v2_bias=setting.v2_bias,
        )  # fmt: skip
        return out


@functools.cache
def _marked_class(base: type[nn.Module]) -> type[_Marked]:
    names = tuple(inspect.signature(base.forward).parameters)[1:]
    space = {"__module__": __name__, "simplex_base": base, "simplex_arguments": names}
    return type(f"Simplex{base.__name__}", (_Marked, base), space)


def _blank(base: type[nn.Module]) -> _Marked:
    cls = _marked_class(base)
    return cls.__new__(cls)


def _projection(like: Any, out_features: int, init: str) -> nn.Linear:
    weight, bias = like.weight, like.bias
    made = nn.Linear(
        like.in_features, out_features, bias is not None, weight.device, weight.dtype
    ).train(like.training)
    if init == "residual":
        nn.init.zeros_(made.weight)
        if made.bias is not None:
            nn.init.zeros_(made.bias)
    return made


def _default_biases(init: str, form: str) -> tuple[float, float]:
    if init == "random":
        return 0.0, 0.0
    if init != "residual":
        raise ValueError(f'init must be "residual" or "random", got {init!r}')
    if form not in _RESIDUAL_BIASES:
        raise ValueError(
            f'no k2 makes the {form} form ordinary attention: give init="random", not "residual"'
        )
    return _RESIDUAL_BIASES[form]


def _checked_window(name: str, window: int | None) -> int | None:
    if window is None or (isinstance(window, int) and window >= 1):
        return window
    raise ValueError(
        f"{name} must be at least 1 (a window counts the query itself), or None, got {window}"
    )


def _refuse_filled_cache(module: nn.Module, cache: Any) -> None:
    if cache is None:
        return
    # Read here and not before: a guard on layer_idx would compile every layer anew.
    seen = cache.get_seq_length(getattr(module, "layer_idx", 0))
    if isinstance(seen, Tensor) or seen != 0:
        raise UnservedMarkError(
            "a marked module was called with a key-value cache that holds keys already, and the "
            "cache does not hold their k2 and v2: call the model with use_cache=False"
        )
