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
    UntypedStorage._cdata                   whether two fake tensors share memory
    node.meta["grapharg"]                   on an input of the graph: .example, the weight itself
    symbolic_shapes.guard_or_false          a claim as a guard; False where no example decides it

Seen in 2.11, 2.13 and 2.15:

    torch.export._trace._export_to_torch_ir Dynamo's graph of a strict export: wrapped by enable()

Seen in 2.11, 2.13 and 2.15, for the lowerings:

    torch._inductor.lowering                register_lowering, fallback_handler and
                                            process_subgraph_nodes, which lowers a graph in place
    torch._inductor.virtualized.V           .graph: current_node, sizevars, unaligned_buffers,
                                            cpp_wrapper and aot_mode; .fake_mode
    torch._inductor.ir                      ExternKernel.require_exact_strides, IRNode
    torch._inductor.decomposition           select_decomp_table
    node.meta["eager_input_vals"]           a call's tensors with the strides of eager code
    _higher_order_ops.triton_kernel_wrap    triton_kernel_wrapper_mutation: a launch as a node;
                                            kernel_side_table and create_tma_stable_metadata: what
                                            a node cannot hold; identify_accessed_tensors (2.11:
                                            identify_mutated_tensors)
    proxy_tensor.make_fx                    a function on fake tensors as a graph
    SymNode.maybe_as_int                    the value of a symbol that guards have fixed
    torch._dynamo.guards, .source           GuardBuilder.EQUALS_MATCH and install_guard; AttrSource
                                            of ImportSource: a setting of torch's as a guard
    torch._guards                           TracingContext and CompileContext: whether Dynamo
                                            compiles
    torch.utils._pytree                     tree_map
    torch.utils._python_dispatch            _disable_current_modes: real arithmetic in the backend
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

TESTED = ("2.11", "2.13", "2.14", "2.15")


def is_tested() -> bool:
    """Say whether this torch is one of the releases that the plugin was tested on."""
    return ".".join(torch.__version__.split(".")[:2]) in TESTED


@functools.cache
def warn_if_untested() -> None:
    """Warn, once, where this torch is none of the releases that the plugin was tested on."""
    if not is_tested():
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


_wrapped: dict[str, tuple[Any, Any]] = {}  # by name: the wrapper, and what it wraps


def wrap_entries(
    serve: Callable[[torch.fx.GraphModule], None],
    for_export: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    """Call `serve` on every graph that enters Inductor, and on what strict export has traced.

    It traces under `for_export`.

    Not `pre_grad_custom_pass`: from 2.13 on that runs after the cache's look-up, without
    the graph's metadata in the key, and on each sub-graph alone.
    """

    def around_inductor(inner: Any) -> Any:
        @functools.wraps(inner)
        def compile_fx_after_pass(model_: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(model_, torch.fx.GraphModule):
                serve(model_)
            return inner(model_, *args, **kwargs)

        return compile_fx_after_pass

    def around_export(inner: Any) -> Any:
        @functools.wraps(inner)
        def export_before_pass(*args: Any, **kwargs: Any) -> Any:
            with for_export():
                found = inner(*args, **kwargs)
            serve(found)
            return found

        return export_before_pass

    for (module, name), around in zip(_entries(), (around_inductor, around_export), strict=True):
        inner = getattr(module, name)
        if name in _wrapped and inner is _wrapped[name][0]:
            continue
        _wrapped[name] = (around(inner), inner)
        setattr(module, name, _wrapped[name][0])


def unwrap_entries() -> None:
    """Undo `wrap_entries`, unless someone wrapped an entry again since.

    Then the wrapper must stay where it is, and whether it does anything is for `serve` to say.
    """
    for module, name in _entries():
        if name in _wrapped and getattr(module, name) is _wrapped[name][0]:
            setattr(module, name, _wrapped.pop(name)[1])


def _entries() -> tuple[tuple[Any, str], tuple[Any, str]]:
    from torch._inductor import compile_fx as inductor
    from torch.export import _trace as export

    return (inductor, "compile_fx"), (export, "_export_to_torch_ir")


def example(value: Any) -> Any:
    """Return the fake tensor or the number that stands for a node; anything else as it is."""
    return value.meta.get("example_value") if isinstance(value, torch.fx.Node) else value


def share_memory(a: torch.fx.Node, b: torch.fx.Node) -> bool:
    """Say whether one of two nodes' tensors may be a view of the other."""
    of = [example(node) for node in (a, b)]
    if not all(isinstance(tensor, torch.Tensor) for tensor in of):
        return True
    try:
        return of[0].untyped_storage()._cdata == of[1].untyped_storage()._cdata
    except NotImplementedError:  # of what vmap batches, as in flex_attention's mask
        return True


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


def modules_of(node: torch.fx.Node) -> dict[str, Any]:
    """Return the modules that a node was traced in, outermost first, by their ids."""
    return node.meta.get("nn_module_stack") or {}


def paths_of(node: torch.fx.Node) -> list[str]:
    """Return those modules' paths from whatever was compiled."""
    return [_readable(path) for path, _ in modules_of(node).values()]


@functools.lru_cache(maxsize=4096)
def _readable(path: str) -> str:
    # L['self']._modules['layers']._modules['0'] and L['self'].layers[0] are both layers.0
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = re.sub(r"\.?__dict__\['_modules'\]", "", path)  # as peft reaches its base model
    path = re.sub(r"\._modules\['(\w+)'\]|\['(\w+)'\]|\[(\d+)\]", r".\1\2\3", path)
    return path.strip(".") or "the compiled module"


def guarded(claim: Any) -> bool:
    """Decide a claim by the example and guard it; False where no example decides it."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(claim)


def number(value: Any) -> Any:
    """Return a plain number for a symbol of which guards have left one value; else as it is."""
    known = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else None
    return value if known is None else known


def identity_of(value: Any) -> Any:
    """Return what tells apart two arguments that are traced to different graphs."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return value.dtype, value.device, tuple(map(identity_of, sizes))
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return tuple(value) if isinstance(value, list) else value


def guard_precision() -> bool:
    """Let Dynamo compile again where another precision of float32 products is set.

    Its own guard tells TF32 from all else, but not IEEE from nothing set. Return whether there is
    a Dynamo that compiles.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, ImportSource
    from torch._guards import CompileContext, TracingContext

    if TracingContext.try_get() is None or CompileContext.try_get() is None:
        return False
    source: Any = ImportSource("torch")
    for name in ("backends", "cuda", "matmul", "fp32_precision"):
        source = AttrSource(source, name)
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))
    return True


def register_lowering(op: Any, lower: Callable[..., Any]) -> None:
    """Let Inductor call a function for each node of an operator, in place of the operator."""
    from torch._inductor import lowering

    lowering.register_lowering(op, type_promotion_kind=None)(lower)


def leave_to_operator(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lower the current node to a call of its operator when the compiled code runs."""
    from torch._inductor import lowering

    return lowering.fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)


def by_name(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by the names of the operator's schema."""
    names = (argument.name for argument in op._schema.arguments)
    return dict(zip(names, args, strict=False)) | kwargs


def current_graph() -> Any:
    """Return the graph that Inductor is lowering."""
    from torch._inductor.virtualized import V

    return V.graph


def arguments_of_current_node(op: Any) -> dict[str, Any]:
    """Return fake tensors and numbers by name, with the strides that eager code had."""
    node = current_graph().current_node
    found = by_name(op, *torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"]))
    eager = node.meta.get("eager_input_vals")  # None for what is no tensor
    known = {} if eager is None else by_name(op, *eager)
    return found | {n: value for n, value in known.items() if isinstance(value, torch.Tensor)}


def fix_sizes(fake: torch.Tensor, dims: tuple[int, ...]) -> None:
    """Make some of a tensor's sizes constants of the graph, by guards."""
    for dim in dims:
        make_constant(fake.shape[dim])


def laid_out(box: Any, fake: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Give a tensor of Inductor's the strides of a fake one; return it, and a fake one like it.

    That one's offset says whether its memory begins at a multiple of 16 bytes.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    box.realize()
    box = ir.ExternKernel.require_exact_strides(box, fake.stride())
    offset = box.get_layout().offset * fake.element_size()
    is_aligned = box.get_name() not in V.graph.unaligned_buffers and (
        V.graph.sizevars.statically_known_multiple_of(offset, 16)
    )
    sizes, strides = (list(map(number, found)) for found in (fake.shape, fake.stride()))
    extent = 2 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    with V.fake_mode:
        memory = torch.empty(extent, dtype=fake.dtype, device=fake.device)
        return box, memory.as_strided(sizes, strides, 0 if is_aligned else 1)


def is_for_package() -> bool:
    """Say whether AOTInductor compiles: its package is not compiled again where a guard fails."""
    from torch._inductor.virtualized import V

    return V.graph.aot_mode


def can_describe_in_graph(row_bytes: int) -> bool:
    """Say whether compiled code can make tensor descriptors of such rows.

    C++ code before 2.15 gives the driver the whole row as the box, which may have 128 bytes.
    """
    from torch._inductor.virtualized import V

    return not V.graph.cpp_wrapper or _release() >= (2, 15) or row_bytes <= 128


def _release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def trace_to_graph(run: Callable[..., Any], inputs: list[Any]) -> torch.fx.GraphModule:
    """Run a function on fake tensors and symbols, and return what it did as a graph."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    with V.fake_mode, torch.no_grad():
        return make_fx(run, decomposition_table=select_decomp_table())(*inputs)


def inline(traced: torch.fx.GraphModule, boxes: list[Any]) -> Any:
    """Lower a traced graph in place of the current node, any number of times."""
    from torch._inductor import lowering

    copied = torch.fx.GraphModule(traced, torch.fx.Graph())
    copied.graph.output(copied.graph.graph_copy(traced.graph, {}))
    with _analysed_once():
        return lowering.process_subgraph_nodes(copied, boxes)


_ACCESSES: dict[Any, Any] = {}


@contextlib.contextmanager
def _analysed_once() -> Iterator[None]:
    """Let Inductor ask once for each kernel and its constants what it reads and writes.

    It compiles a kernel halfway to find out, twice a launch, and keeps nothing: of the five kernels
    of a backward that is most of the time that a layer takes to lower.
    """
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    names = ("identify_accessed_tensors", "identify_mutated_tensors")
    name = next(name for name in names if hasattr(wrap, name))
    analyse = getattr(wrap, name)

    def analyse_once(kernel: Any, kwargs: dict[str, Any], blocks: dict[str, Any]) -> Any:
        key = (_kernel_of(kernel), *_kinds(_kernel_of(kernel), kwargs), *sorted(blocks))
        if key not in _ACCESSES:
            _ACCESSES[key] = analyse(kernel, kwargs, blocks)
        return _ACCESSES[key]

    setattr(wrap, name, analyse_once)
    try:
        yield
    finally:
        setattr(wrap, name, analyse)


def _kinds(kernel: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield what of a launch's arguments can change what a kernel reads and writes."""
    for param in kernel.params:
        value = kwargs[param.name]
        if hasattr(value, "get_dtype") or isinstance(value, torch.Tensor):
            yield value.dtype
        elif param.is_constexpr or value is None:
            yield value
        else:
            yield "a number"


def _kernel_of(kernel: Any) -> Any:
    from triton.runtime.autotuner import Autotuner

    return kernel.fn if isinstance(kernel, Autotuner) else kernel


def is_rewritable(kernel: Any) -> bool:
    """Say whether Inductor can write a kernel out as what it is in eager code.

    It knows plain Triton and no Gluon, and cannot ask for fused multiply-adds, on which the kernels
    count: they must be Triton's default.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    is_plain = isinstance(kernel, JITFunction) and not kernel.is_gluon()
    return is_plain and getattr(knobs.language, "default_fp_fusion", True)


def record_launch(
    kernel: Any,
    programs: Any,
    arguments: dict[str, Any],
    blocks: dict[str, list[int]],
    options: dict[str, int],
) -> None:
    """Trace a launch in a grid of one dimension; `blocks` has the tiles of its descriptors."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    in_graph = (torch.Tensor, torch.SymInt, int, float, str, type(None))
    held = {name: value for name, value in arguments.items() if not isinstance(value, in_graph)}
    wrap.triton_kernel_wrapper_mutation(
        kernel_idx=wrap.kernel_side_table.add_kernel(_configured(kernel, **options)),
        constant_args_idx=wrap.kernel_side_table.add_constant_args(held),
        grid=[(programs, 1, 1)],
        tma_descriptor_metadata={
            name: wrap.create_tma_stable_metadata([*block]) for name, block in blocks.items()
        },
        kwargs={name: value for name, value in arguments.items() if name not in held},
    )


@functools.cache
def _configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """Return a kernel with its options: they reach Inductor as an autotuner's one config."""
    import triton

    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune([config], key=[])(kernel)
