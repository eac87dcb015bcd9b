"""One cell of the support table: run, and judged against what must come out the same."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

from lowering.backend import serve_marks
from simplex_ops import UnservedMarkError, mark_model, marked_modules
from tools.support.models import ROWS, VOCABULARY, Row

SIZES = (12, 17)
NEW_TOKENS = 5


class _ForEachSizeError(Exception):
    """It is served, and compiled anew for another size."""


@dataclass(frozen=True)
class Outcome:
    """What a cell says, and why, where that is no "yes" or "–".

    "for each size" is served, by a graph of its own for each length; "refused" raises by design;
    "nor unmarked" fails in the libraries, without a mark too; "fails" is a fault of ours; a library
    may be "not installed".
    """

    said: str
    why: str = ""


@dataclass(frozen=True)
class Column:
    """A way to run a model."""

    title: str
    run: Callable[[Row], None]
    of_generators: bool = False


def outcome(row: Row, column: Column) -> Outcome:
    """Run a cell."""
    if column.of_generators and not row.generates:
        return Outcome("–")
    torch._dynamo.reset()
    try:
        column.run(row)
    except ImportError as error:
        return Outcome("not installed", str(error))
    except _ForEachSizeError:
        return Outcome("for each size")
    except Exception as error:  # noqa: BLE001 (whatever it is, the cell says it)
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        return _refused(error) or Outcome(
            "nor unmarked" if _fails_unmarked(row, column, error) else "fails", why
        )
    return Outcome("yes")


def _fails_unmarked(row: Row, column: Column, error: Exception) -> bool:
    torch._dynamo.reset()
    try:
        column.run(replace(row, how=None))
    except Exception as found:  # noqa: BLE001 (any other is no answer)
        return (type(found), str(found)) == (type(error), str(error))
    return False


def _refused(error: BaseException) -> Outcome | None:
    text = str(error)
    refused = isinstance(error, UnservedMarkError) or "UnservedMarkError" in text
    if not refused:
        return None
    listed = [line for line in text.splitlines() if line.startswith("  - ")]
    why = listed[0].partition(": ")[2] if listed else text.partition("cannot run: ")[2] or text
    why = re.sub(r"^a marked module, .*?, (?=was |called )", "it ", " ".join(why.split()))
    return Outcome("refused", why)


def _built(row: Row, marked: bool = True, build: Callable[[], Any] | None = None) -> Any:
    """Return a model with random k2 and v2, or unmarked; always the same weights."""
    torch.manual_seed(0)
    model = (build or row.build)().train()
    if marked:
        _mark(model, row, (5, 3))
        for module in marked_modules(model).values():
            _draw(module)
    return model


def _mark(model: Any, row: Row, window: tuple[int | None, int]) -> None:
    if row.how is None:
        return
    done = mark_model(model, **{"every": 1, "window": window, **row.how})
    if not done.marked:
        raise UnservedMarkError("; ".join(done.left.values()) or "no attention module is known")


def _draw(module: Any) -> None:
    for layer in (module.simplex_k2, module.simplex_v2, module.simplex_k2_norm):
        for parameter in () if layer is None else layer.parameters():
            nn.init.normal_(parameter, std=0.3)


def _out(run: Any, x: Tensor) -> Tensor:
    out = run(x)
    for name in ("logits", "last_hidden_state"):
        out = getattr(out, name, out)
    return out


def _step(run: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = _out(run, x)
    out.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def _answer(run: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        return {"out": _out(run, x)}


def _same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def eager_as_plain(do: Callable[..., dict[str, Tensor]]) -> Callable[[Row], None]:
    """Compare a fresh mark, of an unbounded first window, with the model before it was marked."""

    def run(row: Row) -> None:
        model = _built(row, marked=False)
        for size in SIZES:
            x = row.inputs(size)
            expected = do(model, model, x)
            marked = _built(row, marked=False)
            _mark(marked, row, (None, 3))
            got = do(marked, marked, x)
            _same(got, expected)
            added = {n for n, p in marked.named_parameters() if "simplex" in n}
            assert added, "nothing was marked"
            assert len(got) == 1 or any(got[name].any() for name in added & got.keys())
            for module in marked_modules(marked).values():
                _draw(module)
            moved = (do(marked, marked, x)["out"] - expected["out"]).abs().max()
            assert moved > 1e-4, "k2 and v2 have no effect"

    return run


class Counted:
    """A backend: the pass, then what is to compile; it counts its graphs."""

    then = "eager"

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        serve_marks(gm)
        return lookup_backend(self.then)(gm, example_inputs)


def compiled_as_eager(do: Callable[..., dict[str, Tensor]], dynamic: bool) -> Callable[[Row], None]:
    """Compare one whole graph with eager code, at two sizes."""

    def run(row: Row) -> None:
        model = _built(row)
        eager = _built(row, build=row.same_as)
        count, graphs = Counted(), []
        run = torch.compile(model, backend=count, fullgraph=True, dynamic=dynamic)
        for size in SIZES:
            x = row.inputs(size)
            _same(do(run, model, x), do(eager, eager, x))
            graphs.append(count.graphs)
        if dynamic and graphs[0] != graphs[-1]:
            raise _ForEachSizeError

    return run


@torch.no_grad()
def _recomputed(model: Any, ids: Tensor) -> Tensor:
    for _ in range(NEW_TOKENS):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


def _checkpointed(model: Any, use_reentrant: bool) -> Callable[[Tensor], Any]:
    """Return a model's forward, by layers in transformers, else as a whole, recomputed."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.config.use_cache = False  # which a checkpoint does not go with
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model
    return lambda x: checkpoint(model, x, use_reentrant=use_reentrant)


def checkpoints(**compiled: Any) -> Callable[[Row], None]:
    """Compare a step that is recomputed, by both kinds of checkpoint, with one that is not."""

    def run(row: Row) -> None:
        plain = _built(row, build=row.same_as)
        for use_reentrant in (False, True):
            model = _built(row)
            run = _checkpointed(model, use_reentrant)
            if compiled:
                torch._dynamo.reset()
                run = torch.compile(run, backend=Counted(), fullgraph=True, **compiled)
            for size in SIZES:
                x = row.inputs(size)
                x.requires_grad_(x.is_floating_point())  # a reentrant one goes by its inputs
                _same(_step(run, model, x), _step(plain, plain, x))

    return run


def autocasts(**compiled: Any) -> Callable[[Row], None]:
    """Hold a step under autocast to twice the rounding of eager code, or of the unmarked model."""

    def run(row: Row) -> None:
        plain = _built(row, marked=bool(compiled), build=row.same_as)
        model = _built(row, marked=bool(compiled))
        run = model
        if compiled:
            run = torch.compile(model, backend=Counted(), fullgraph=True, **compiled)
        else:
            _mark(model, row, (None, 3))
        for size in SIZES:
            x = row.inputs(size)
            exact = _step(plain, plain, x)
            with torch.autocast("cpu", torch.bfloat16):
                rounded, got = _step(plain, plain, x), _step(run, model, x)
            for name, value in exact.items():
                step = torch.finfo(torch.bfloat16).eps * value.abs().max()
                allowed = 2 * (rounded[name] - value).abs().max() + step
                assert (got[name] - value).abs().max() <= allowed, f"{name} is over its budget"

    return run


def generates(compiled: bool, **cache: Any) -> Callable[[Row], None]:
    """Compare the tokens of generate() with recomputing from the whole prefix."""

    def run(row: Row) -> None:
        model = _built(row).eval()
        ids = row.inputs(SIZES[0])
        expected = _recomputed(model, ids)
        # What pads is no token: masks would be made of it.
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": VOCABULARY}
        with _compiled_forward(model) if compiled else contextlib.nullcontext():
            got = model.generate(ids, attention_mask=torch.ones_like(ids), **how, **cache)
        assert torch.equal(got, expected), "other tokens than those of the whole prefix"

    return run


@contextlib.contextmanager
def _compiled_forward(model: Any) -> Iterator[None]:
    model.forward = torch.compile(model.forward, backend=Counted())
    try:
        yield
    finally:
        del model.forward


_STATIC, _DYNAMIC = {"dynamic": False}, {"dynamic": True}
_CACHE = {"cache_implementation": "static"}
COLUMNS = (
    Column("eager, train", eager_as_plain(_step)),
    Column("eager, train, checkpointed", checkpoints()),
    Column("eager, train, autocast", autocasts()),
    Column("eager, infer", eager_as_plain(_answer)),
    Column("eager, generate, growing cache", generates(False), True),
    Column("eager, generate, static cache", generates(False, **_CACHE), True),
    Column("compiled, train, static", compiled_as_eager(_step, **_STATIC)),
    Column("compiled, train, dynamic", compiled_as_eager(_step, **_DYNAMIC)),
    Column("compiled, train, checkpointed, static", checkpoints(**_STATIC)),
    Column("compiled, train, checkpointed, dynamic", checkpoints(**_DYNAMIC)),
    Column("compiled, train, autocast, static", autocasts(**_STATIC)),
    Column("compiled, train, autocast, dynamic", autocasts(**_DYNAMIC)),
    Column("compiled, infer, static", compiled_as_eager(_answer, **_STATIC)),
    Column("compiled, infer, dynamic", compiled_as_eager(_answer, **_DYNAMIC)),
    Column("compiled, generate, growing cache", generates(True), True),
    Column("compiled, generate, static cache", generates(True, **_CACHE), True),
)


def outcomes(name: str, then: str) -> list[Outcome]:
    """Run all cells of a row, in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    Counted.then = then
    (row,) = (row for row in ROWS if row.name == name)
    return [outcome(row, column) for column in COLUMNS]
