"""Every private name of Dynamo and Inductor that this plugin touches, and where it was seen.

Seen in 2.11, 2.13, 2.14 and 2.15:

    torch._inductor.compile_fx.compile_fx   Inductor's entry: called by the backend, wrapped by
                                            enable()
    torch._inductor.list_mode_options       `mode=` of torch.compile as Inductor options
    torch._inductor.cudagraph_trees         reset_cudagraph_trees, for torch._dynamo.reset()
    node.meta["example_value"]              a node's fake tensor or symbolic number
    node.meta["nn_module_stack"]            {id: (path, class)}; absent where the frame is the
                                            module's own
    SymInt.node.hint                        a symbolic size's example, without a guard
    SymInt.node.expr, .shape_env            which sizes mark_dynamic keeps symbolic: the shape_env's
                                            tracked fakes and their contexts' constraints
    symbolic_shapes.statically_known_true   a claim about symbolic sizes, without a guard
    Tensor._version                         writes into a fake tensor
    node.meta["grapharg"]                   on an input of the graph: .example, the weight itself
    torch.utils._pytree                     tree_map
    torch.utils._python_dispatch            _disable_current_modes: real arithmetic in the backend
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

TESTED = ("2.11", "2.13", "2.14", "2.15")


@functools.cache
def warn_if_untested() -> None:
    """Warn, once, where this torch is none of the releases that the plugin was tested on."""
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in TESTED:
        warnings.warn(
            f"the simplex plugin of torch.compile was tested on torch {', '.join(TESTED)}; "
            f"this is {torch.__version__}. It reads private names of Dynamo and Inductor: "
            "compare a compiled model with the eager one before you trust it",
            stacklevel=3,
        )


def compile_fx(
    gm: torch.fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any] | None
) -> Any:
    """Compile a graph with Inductor, under some of its options."""
    from torch._inductor import compile_fx as inductor

    return inductor.compile_fx(gm, example_inputs, config_patches=patches)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Return the Inductor options that a mode of torch.compile stands for."""
    from torch._inductor import list_mode_options

    return {} if mode in (None, "default") else list_mode_options(mode)


def reset_cudagraphs() -> None:
    """Forget recorded CUDA graphs, as torch.compile's own backend does on a reset."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


_wrapper: list[tuple[Any, Any]] = []  # the wrapped compile_fx and what it wraps


def wrap_compile_fx(before: Callable[[torch.fx.GraphModule], None]) -> None:
    """Call `before` on every graph that enters Inductor; where that is so already, do nothing.

    Not `pre_grad_custom_pass`: from 2.13 on that runs after the cache's look-up, without
    the graph's metadata in the key, and on each sub-graph alone.
    """
    from torch._inductor import compile_fx as inductor

    inner = inductor.compile_fx
    if _wrapper and inner is _wrapper[0][0]:
        return

    @functools.wraps(inner)
    def compile_fx_after_pass(model_: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model_, torch.fx.GraphModule):
            before(model_)
        return inner(model_, *args, **kwargs)

    _wrapper[:] = [(compile_fx_after_pass, inner)]
    inductor.compile_fx = compile_fx_after_pass


def unwrap_compile_fx() -> None:
    """Undo `wrap_compile_fx`, unless someone wrapped compile_fx again since.

    Then the wrapper must stay where it is, and whether it does anything is for `before` to say.
    """
    from torch._inductor import compile_fx as inductor

    if _wrapper and inductor.compile_fx is _wrapper[0][0]:
        inductor.compile_fx = _wrapper.pop()[1]


def example(value: Any) -> Any:
    """Return the fake tensor or the number that stands for a node; anything else as it is."""
    return value.meta.get("example_value") if isinstance(value, torch.fx.Node) else value


def is_symbolic(value: Any) -> bool:
    """Say whether a number is a symbol, which may differ from call to call of a graph."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_number(value: Any) -> bool:
    """Say whether a node stands for a number, symbolic or not."""
    return isinstance(value, (int, float)) or is_symbolic(value)


def hint(value: Any) -> Any:
    """Return the example of a symbolic number as a plain one, without a guard on it."""
    if not is_symbolic(value):
        return value
    kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
    return kind(value.node.hint)


def known(claim: Any) -> bool:
    """Say whether a claim about symbolic sizes holds at all of them; adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(claim)


def guard(claim: Any) -> None:
    """Make a claim that holds for the example a guard of the compiled code."""
    assert bool(claim)


def agree(a: Any, b: Any) -> bool:
    """Say whether two sizes are equal; where the example alone says so, guard it."""
    if hint(a) != hint(b):
        return False
    guard(a == b)
    return True


def make_constant(value: Any) -> Any:
    """Turn a symbolic number into its example's value, guarded: another one compiles again."""
    kinds = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return kinds[type(value)](value) if is_symbolic(value) else value


def must_stay_symbolic(value: Any) -> bool:
    """Say whether mark_dynamic forbids to make this number a constant."""
    symbols = getattr(value.node.expr, "free_symbols", set())
    for tracked in value.node.shape_env.tracked_fakes or ():
        rules = getattr(tracked.symbolic_context, "constraint_sizes", None)
        if not isinstance(tracked.fake, torch.Tensor) or rules is None:
            continue
        for size, rule in zip(tracked.fake.shape, rules, strict=True):
            strict = rule is not None and not rule.warn_only
            if strict and isinstance(size, torch.SymInt) and symbols & size.node.expr.free_symbols:
                return True
    return False


def weight_of(node: torch.fx.Node) -> torch.nn.Parameter | None:
    """Return the model's weight that an input of Dynamo's graph stands for."""
    weight = getattr(node.meta.get("grapharg"), "example", None)
    return weight if isinstance(weight, torch.nn.Parameter) else None


def is_dynamos(graph: torch.fx.Graph) -> bool:
    """Say whether Dynamo traced a whole frame as this graph."""
    return any("grapharg" in node.meta for node in graph.nodes if node.op == "placeholder")


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Leave fake tensor and tracing modes for a while."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def module_stack(node: torch.fx.Node) -> dict[str, str]:
    """Return the modules that a node was traced in, outermost first: id to path in the model."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: _readable(path) for key, (path, _) in stack.items()}


def _readable(path: str) -> str:
    # L['self']._modules['layers']._modules['0'] and L['self'].layers[0] are both layers.0
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = re.sub(r"\.?__dict__\['_modules'\]", "", path)  # as peft reaches its base model
    path = re.sub(r"\._modules\['(\w+)'\]|\['(\w+)'\]|\[(\d+)\]", r".\1\2\3", path)
    return path.strip(".") or "the compiled module"
