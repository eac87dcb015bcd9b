"""Marking: turn an attention module of an existing model into 2-simplicial attention, in place."""

from typing import Any

import torch
from torch import fx, jit, nn

from simplex_ops.contract.checks import check_form
from simplex_ops.marking import config_entry, fast_path
from simplex_ops.marking.families.family import Copied, Family, Projections
from simplex_ops.marking.families.known import family_of
from simplex_ops.marking.instance_forward import hides, put_back, put_inside
from simplex_ops.marking.marked import Marked, has_marked_class, is_marked, marked_class
from simplex_ops.marking.naming import described
from simplex_ops.marking.saved import CHILD, SavedMark
from simplex_ops.marking.second import SecondNorm, SecondProjection
from simplex_ops.marking.setting import Mark, check_init, pair_of
from simplex_ops.marking.windows_in_graphs import count_windows
from simplex_ops.marking.wrapped import refuse_wrapped

# (k2_bias, v2_bias) under which zero projections leave ordinary attention through w1.
_RESIDUAL_BIASES = {"trilinear": (1.0, 1.0), "strassen": (0.0, 1.0)}
_CHILDREN = ("simplex_k2", "simplex_v2", "simplex_k2_norm", CHILD)


def mark(
    module: nn.Module,
    *,
    window: tuple[int | None, int | None] = (512, 32),
    form: str = "trilinear",
    k2_bias: float | None = None,
    v2_bias: float | None = None,
    init: str = "residual",
    is_causal: bool | None = None,
    attention_dropout: float | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    window_schedule: bool = False,
) -> nn.Module:
    """Make an attention module 2-simplicial, in place, and return it.

    The module keeps its class's forward, its weights and its name in the model, and gets two linear
    layers, `simplex_k2` and `simplex_v2`, that make k2 and v2 from its input as its own projections
    make keys and values. Where its forward calls `F.scaled_dot_product_attention(q, k, v)`,

        simplex::attn(q, k, k2, v, v2, w1, w2, scale=..., form=..., k2_bias=..., v2_bias=...)

    runs instead, eager and compiled alike; compiled, by the pass of backend="simplex" or
    `simplex_ops.enable()`. Eager code serves modules that call that function, or
    `F.multi_head_attention_forward`; any other raises there. Mark a model before an optimizer takes
    its parameters, and before a state dict with k2 and v2 is loaded.

    Known are Hugging Face's Llama, Qwen3, Mistral and all shaped like them, GPT-2, and
    `nn.MultiheadAttention` (with the layers of nn.TransformerEncoder, whose fast path a mark turns
    off). Of any other module whose forward takes [B, N, E] first, give `kv_heads` and `head_dim`,
    or describe its kind by `register_family`.

    A mask that the module is given becomes a range of keys for each query, for both pairs of keys:
    padding, packed documents, windows and chunks, as truth values or as additive 0 and the dtype's
    smallest number. What is no such range raises when it runs.

    Rotary embeddings stay where the module puts them, on q and k (k1); k2 and v2 get none. The
    trilinear and strassen forms are not invariant under a rotation of all three, and with k2 = 1
    the rotated q and k1 leave the model's own attention. Where the module norms its keys over
    head_dim (Qwen3's k_norm), k2 is normed too, by `simplex_k2_norm`: k2 is a factor of a trilinear
    logit as q and k1 are, and norms on two of three would leave it unbounded. The norm's weight is
    then what starts at zero, and not the projection, since a norm has slope 1 / sqrt(eps) at zero.

    The settings travel with the model: as a tensor of integers in the state dict, and to be read in
    config.json where there is one. `mark_like` and `from_pretrained` mark a model as they say.

    Adapters that divide by the norm of a weight (DoRA) give NaN on weights of zero, as k2 and v2
    start with: leave the two out (exclude_modules=["simplex_k2", "simplex_v2"] in peft, and train
    them whole by modules_to_save), or start from "random" or "copy".

    Args:
        module: the attention module.
        window: (w1, w2) in keys, the query's own position included; None is unbounded. Whatever is
            integral is taken.
        form: "trilinear", "determinant" or "strassen".
        k2_bias: added to k2 inside the operator; None is 0, but 1 where init is "residual" and the
            form is trilinear.
        v2_bias: added to v2 inside the operator; None is 0, but 1 where init is "residual".
        init: "residual" starts from zero, so that with the default biases the module starts as
            ordinary attention through w1, and comes back there when the model's layers are
            initialised anew. "copy" starts from the weights of k and v, as they are now. "random"
            as nn.Linear starts.
        is_causal: None takes the module's own `is_causal`, True where it has none.
        attention_dropout: None refuses attention dropout in training; 0.0 drops it.
        kv_heads: key-value heads of a module of no known family.
        head_dim: size of its heads, of keys and values alike.
        dtype: of k2 and v2; None is that of the module's projection, or, where that is quantised,
            the one in which it or its model's config says to compute.
        window_schedule: the windows will change (`module.simplex_mark` is replaced), so compiled
            code takes them as numbers from the first call on and is compiled once; without it, they
            are constants at first and the first change compiles once more. It is no setting of the
            model and is saved with none.

    Raises:
        TypeError: the module is not of a shape that marking knows; the message says what it lacks.
        ValueError: it is marked already, or an argument is not one of the above.
    """
    if is_marked(module):
        raise ValueError(
            f"{described(module)} is marked already: unmark() it, or replace its simplex_mark"
        )
    if isinstance(module, (fx.GraphModule, jit.ScriptModule)):
        raise TypeError(
            f"mark() serves modules whose forward is Python's, got {type(module).__name__}: "
            "mark the model before it is traced or scripted"
        )
    w1, w2 = pair_of(window)
    default_k2, default_v2 = _default_biases(init, form)
    family, found = family_of(module, kv_heads, head_dim)
    setting = Mark(
        w1,
        w2,
        form,
        default_k2 if k2_bias is None else float(k2_bias),
        default_v2 if v2_bias is None else float(v2_bias),
        bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
        found.head_dim,
        found.v_head_dim,
        _drops(attention_dropout),
        init,
        found.kv_heads,
        window_schedule,
    )
    return mark_as(module, setting, family, found, dtype)


def mark_as(
    module: nn.Module,
    setting: Mark,
    family: Family,
    found: Projections,
    dtype: torch.dtype | None = None,
    copied: bool = True,
) -> nn.Module:
    """Mark a module as a setting says; without `copied`, init="copy" waits for loaded weights.

    Raises:
        TypeError, ValueError: as `mark` does.
    """
    if hides(module, type(module).forward):
        raise TypeError(
            f"{described(module)} has a forward on the instance, which would pass a mark by: take "
            "it away (`del module.forward`), mark the module, then put it on again around the "
            "forward that it finds"
        )
    for name in (*_CHILDREN, "simplex_mark"):
        if hasattr(module, name):
            raise TypeError(f"{described(module)} has a {name} already, which a mark would replace")
    refuse_wrapped(module, found.weight_name, found.weight)
    children = _children(module, setting, found, dtype)
    if setting.init == "copy" and copied:
        _copy(module, found, children)
    base = type(module)
    made = marked_class(base, family)
    # What may raise has been done: from here on the module is marked as a whole.
    object.__setattr__(module, "__class__", made)
    for name, child in children.items():
        module.register_module(name, child)
    module.simplex_mark = setting  # pyright: ignore[reportArgumentType]
    put_inside(module, base.forward, made.forward)
    fast_path.turn_off(module)
    count_windows(setting)
    return module


def unmark(module: nn.Module) -> nn.Module:
    """Give a marked module back as it was before mark(), without k2 and v2, and return it.

    Raises:
        ValueError: the module is not marked, or something was put around it since.
    """
    if not is_marked(module):
        raise ValueError(f"{described(module)} is not marked")
    if not has_marked_class(module):
        raise ValueError(
            f"{described(module)} became a {type(module).__name__} after it was marked, which "
            "unmark() would undo as well: undo that first"
        )
    base = module.simplex_base
    if hides(module, Marked.forward):
        raise ValueError(
            f"{described(module)} has a forward on the instance, which may call the marked one: "
            "take it away first (`del module.forward`)"
        )
    put_back(module, Marked.forward, base.forward)
    fast_path.turn_on(module)
    config_entry.forget(module)
    for name in _CHILDREN:
        delattr(module, name)
    del module.simplex_mark
    object.__setattr__(module, "__class__", base)
    return module


def _children(
    module: nn.Module, setting: Mark, found: Projections, dtype: torch.dtype | None
) -> dict[str, nn.Module | None]:
    dtype = found.dtype if dtype is None else dtype
    if dtype is None:
        raise TypeError(
            f"the {found.weight_name} of {described(module)} is quantised and does not say in "
            "which dtype it computes: give mark() the dtype= of the module's input, or mark the "
            "model before it is quantised"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point dtype, got {dtype}")
    zero, normed = setting.init == "residual", found.norm_eps is not None
    how: dict[str, Any] = {"device": found.device, "dtype": dtype}
    inputs, heads = found.in_features, found.kv_heads
    children: dict[str, nn.Module | None] = {
        "simplex_k2": SecondProjection(
            zero and not normed, inputs, heads * found.head_dim, found.bias, **how
        ),
        "simplex_v2": SecondProjection(zero, inputs, heads * found.v_head_dim, found.bias, **how),
        "simplex_k2_norm": None,
        CHILD: SavedMark(setting, found.device),
    }
    if normed:
        children["simplex_k2_norm"] = SecondNorm(zero, found.head_dim, found.norm_eps, **how)
    for child in children.values():
        if child is not None:
            child.train(module.training)
    return children


def _copy(module: nn.Module, found: Projections, children: dict[str, Any]) -> None:
    copied = found.copied()
    if not isinstance(copied, Copied):
        raise TypeError(
            f'init="copy" cannot copy k and v of {described(module)}: {copied}; give '
            'init="residual" or init="random"'
        )
    if copied.k_weight.is_meta:
        raise ValueError(
            f'init="copy" copies k and v as they are, and those of {described(module)} are on the '
            'meta device: mark the model after its weights are loaded, or give init="residual"'
        )
    pairs = ((children["simplex_k2"], *copied[:2]), (children["simplex_v2"], *copied[2:]))
    with torch.no_grad():
        for made, weight, bias in pairs:
            made.weight.copy_(weight)
            if made.bias is not None and bias is not None:
                made.bias.copy_(bias)


def _drops(attention_dropout: float | None) -> bool:
    if attention_dropout is not None and attention_dropout != 0.0:
        raise ValueError(
            "attention_dropout must be 0.0, which drops the module's attention dropout, or None, "
            f"got {attention_dropout!r}: 2-simplicial attention has no dropout"
        )
    return attention_dropout is not None


def _default_biases(init: str, form: str) -> tuple[float, float]:
    check_form(form)
    check_init(init)
    if init != "residual":
        return 0.0, 0.0
    if form not in _RESIDUAL_BIASES:
        raise ValueError(
            f'no k2 makes the {form} form ordinary attention: give init="random" or "copy", not '
            '"residual"'
        )
    return _RESIDUAL_BIASES[form]
