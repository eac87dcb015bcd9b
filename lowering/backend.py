"""The `simplex` backend of torch.compile: the pass, then Inductor."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

from lowering import compat, report
from lowering.passes import pipeline
from simplex_ops.rules import cache_key


def simplex(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite marked modules in Dynamo's graph and compile it with Inductor.

    `torch.compile(model, backend="simplex")` finds it by its entry point. `mode` and `options` mean
    what they mean to Inductor.

    Raises:
        UnservedMarkError: a mark cannot be served; torch.compile shows it as the cause of its
            BackendCompilerFailed.
    """
    serve_marks(gm)
    patches = {**compat.mode_options(mode), **(options or {})}
    return compat.compile_fx(gm, example_inputs, patches or None)


# Not a note in gm.meta: the graphs into which DDPOptimizer splits one share its meta.
_SERVED: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()


def serve_marks(gm: fx.GraphModule) -> None:
    """Run the pass on a graph, once, keep its report, and raise where a mark was refused."""
    if gm in _SERVED:
        return  # Inductor's entry calls itself to apply options, and the backend calls it
    _SERVED.add(gm)
    compat.warn_if_untested()
    cache_key.extend(f"passes:{pipeline.identity()}")
    found = pipeline.run_passes(gm)
    if found != report.Report():
        report.keep(found)
        if report.LOG.isEnabledFor(logging.DEBUG):
            report.LOG.debug("the graph:\n%s", gm.print_readable(print_output=False))
    found.raise_if_refused()


simplex.reset = compat.reset_cudagraphs  # pyright: ignore[reportFunctionMemberAccess]
