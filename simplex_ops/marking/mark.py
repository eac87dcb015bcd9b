"""Marking: turn an attention module of an existing model into 2-simplicial attention, in place."""

from typing import Any

from torch import fx, jit, nn

from simplex_ops.contract.checks import check_form
from simplex_ops.marking.families.family import Projections
from simplex_ops.marking.families.known import family_of
from simplex_ops.marking.instance_forward import hides, put_inside
from simplex_ops.marking.marked import Marked, has_marked_class, is_marked, marked_class
from simplex_ops.marking.naming import described
from simplex_ops.marking.setting import Mark, pair_of
from simplex_ops.marking.wrapped import refuse_wrapped

# (k2_bias, v2_bias) under which zero projections leave ordinary attention through w1.
_RESIDUAL_BIASES = {"trilinear": (1.0, 1.0), "strassen": (0.0, 1.0)}


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
            f"{described(module)} is marked already: unmark() it, or replace its simplex_mark"
        )
    if isinstance(module, (fx.GraphModule, jit.ScriptModule)):
        raise TypeError(
            f"mark() serves modules whose forward is Python's, got {type(module).__name__}: "
            "mark the model before it is traced or scripted"
        )
    w1, w2 = pair_of(window)
    family, found = family_of(module)
    default_k2, default_v2 = _default_biases(init, form)
    setting = Mark(
        w1,
        w2,
        form,
        default_k2 if k2_bias is None else float(k2_bias),
        default_v2 if v2_bias is None else float(v2_bias),
        bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal,
        found.head_dim,
        found.v_head_dim,
    )
    if hides(module, type(module).forward):
        raise TypeError(
            f"{described(module)} has a forward on the instance, which would pass a mark by: take "
            "it away (`del module.forward`), mark the module, then put it on again around the "
            "forward that it finds"
        )
    for name in ("simplex_k2", "simplex_v2", "simplex_mark"):
        if hasattr(module, name):
            raise TypeError(f"{described(module)} has a {name} already, which a mark would replace")
    refuse_wrapped(module, found.like_name, found.like)
    k2 = _projection(found, found.head_dim, init)
    v2 = _projection(found, found.v_head_dim, init)
    base = type(module)
    made = marked_class(base, family)
    # What may raise has been done: from here on the module is marked as a whole.
    object.__setattr__(module, "__class__", made)
    module.add_module("simplex_k2", k2)
    module.add_module("simplex_v2", v2)
    module.simplex_mark = setting  # pyright: ignore[reportArgumentType]
    put_inside(module, base.forward, made.forward)
    return module


def unmark(module: nn.Module) -> nn.Module:
    """Give a marked module its own attention back, drop its k2 and v2, and return it.

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
    put_inside(module, Marked.forward, base.forward)
    del module.simplex_k2, module.simplex_v2, module.simplex_mark
    object.__setattr__(module, "__class__", base)
    return module


def marked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the marked modules of a model by name."""
    return {name: module for name, module in model.named_modules() if is_marked(module)}


def _projection(found: Projections, width: int, init: str) -> nn.Linear:
    like: Any = found.like
    made = nn.Linear(
        like.in_features,
        found.kv_heads * width,
        like.bias is not None,
        like.weight.device,
        like.weight.dtype,
    ).train(like.training)
    if init == "residual":
        nn.init.zeros_(made.weight)
        if made.bias is not None:
            nn.init.zeros_(made.bias)
    return made


def _default_biases(init: str, form: str) -> tuple[float, float]:
    check_form(form)
    if init == "random":
        return 0.0, 0.0
    if init != "residual":
        raise ValueError(f'init must be "residual" or "random", got {init!r}')
    if form not in _RESIDUAL_BIASES:
        raise ValueError(
            f'no k2 makes the {form} form ordinary attention: give init="random", not "residual"'
        )
    return _RESIDUAL_BIASES[form]
