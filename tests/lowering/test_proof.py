"""Masks inside graphs: which are proven causal, for which sizes, and what is said of the others."""

import re

import pytest
import torch
import torch.nn.functional as F
from passed import Masked, Passed, passed_alone, refusal_in, refusal_of
from tiny_llama import attention, band, llama, mark_layers, randomize, sdpa, states, tokens
from torch import fx
from torch._dynamo.backends.debugging import eager
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MistralConfig, MistralForCausalLM

from lowering.backend import serve_marks
from lowering.graphs.mask_rule import Claims, Linear, Unread, read_rule
from simplex_ops import UnservedMarkError, mark
from simplex_ops.marking.ranges import RANGES_OP


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


class Counted:
    """A backend: the pass, then another; it counts graphs."""

    def __init__(self, then="eager"):
        self.counter = CompileCounterWithBackend(then)

    def __call__(self, gm, example_inputs):
        serve_marks(gm)
        return self.counter(gm, example_inputs)

    @property
    def graphs(self):
        return self.counter.frame_count


def _rows(x):
    return torch.arange(x.shape[1], device=x.device)


def _causal(x):
    return (_rows(x)[:, None] >= _rows(x))[None, None]


def _additive(x):
    hidden = torch.full((x.shape[1], x.shape[1]), torch.finfo(torch.float32).min)
    return hidden.triu(1).expand(x.shape[0], 1, -1, -1)


def _filled(x):
    hidden = ~_causal(x)
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill(hidden, float("-inf"))


def _chosen(x):
    return torch.where(_causal(x), torch.tensor(0.0), torch.finfo(torch.float32).min)


def _multiplied(x):
    return (1.0 - torch.ones(x.shape[1], x.shape[1]).tril()) * torch.finfo(torch.float32).min


def _two_dimensions(x):
    return _causal(x)[0, 0]


def _three_dimensions(x):
    return _causal(x)[0].expand(4, -1, -1)


def _lower(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def _not_above(x):
    return ~torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool).triu(diagonal=1)


def _windowed(window, x):
    rows = _rows(x)
    return ((rows <= rows[:, None]) & (rows > rows[:, None] - window))[None, None]


def _within_16(x):
    return _windowed(16, x)


def _chunks_of_16(x):
    rows = _rows(x)
    return _causal(x) & (rows[:, None] // 16 == rows // 16)


ADDED_BY_RULE = [_additive, _filled, _chosen]
BY_RULE = [_causal, _two_dimensions, _three_dimensions, _lower, _not_above, *ADDED_BY_RULE]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("make", [*BY_RULE, _multiplied, _within_16, _chunks_of_16])
def test_a_causal_mask_is_proven_and_left_out(make, dynamic):
    model, x = Masked(make), states()
    expected = model.attention(x)
    torch.testing.assert_close(passed_alone(model, dynamic=dynamic)(x), expected)


@pytest.mark.parametrize(
    ("make", "then"), [*((make, "eager") for make in BY_RULE), (_causal, "aot_eager")]
)
def test_a_mask_by_rule_is_served_at_every_size_by_one_graph(make, then):
    model, backend = Masked(make), Counted(then)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for seq in (8, 12, 40, 23):
        torch.testing.assert_close(run(states(seq)), model.attention(states(seq)))
    assert backend.graphs == 2  # one for 8, one for all


def test_a_window_wider_than_the_sequence_is_guarded_and_not_compiled_for_each_size():
    model, backend = Masked(_within_16, window=(40, 3)), Counted()
    run = torch.compile(model, backend=backend, fullgraph=True)
    for seq in (8, 12, 14, 10, 16):
        torch.testing.assert_close(run(states(seq)), model.attention(states(seq)))
    assert backend.graphs == 2
    torch.testing.assert_close(run(states(17)), model(states(17)))
    assert backend.graphs == 3


@pytest.mark.parametrize("make", [_multiplied, _chunks_of_16])
def test_a_mask_proven_at_a_size_is_compiled_again_at_another(make):
    model, backend = Masked(make, window=(40, 3)), Counted()
    run = torch.compile(model, backend=backend, fullgraph=True)
    for seq in (8, 12, 14, 12):
        torch.testing.assert_close(run(states(seq)), model.attention(states(seq)))
    assert backend.graphs == 3
    if make is _chunks_of_16:
        torch.testing.assert_close(run(states(40)), model(states(40)))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("make", [_within_16, _chunks_of_16])
def test_a_mask_that_hides_more_at_longer_sequences_is_kept_there(make, dynamic):
    model = Masked(make, window=(40, 3))
    run = torch.compile(model, backend=Passed(eager), dynamic=dynamic)
    for seq in (8, 12):
        torch.testing.assert_close(run(states(seq)), model.attention(states(seq)))
    torch.testing.assert_close(run(states(40)), model(states(40)))
    assert (run(states(40)) - model.attention(states(40))).abs().max() > 1e-3


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_sliding_window_from_the_config_is_not_lost_at_longer_sequences(dynamic):
    torch.manual_seed(0)
    sizes = llama(layers=1).config.to_dict()
    kept = {name: sizes[name] for name in sizes if name not in ("model_type", "architectures")}
    model = MistralForCausalLM(MistralConfig(**{**kept, "sliding_window": 16})).eval()
    randomize(mark(attention(model, 0), window=(40, 3)))
    run = torch.compile(model, backend=Passed(eager), dynamic=dynamic)
    with torch.no_grad():
        for seq in (12, 13):
            torch.testing.assert_close(run(tokens(seq)).logits, model(tokens(seq)).logits)
        got = run(tokens(40)).logits
        torch.testing.assert_close(got, model(tokens(40)).logits)
        model.config.sliding_window = None
        assert (got - model(tokens(40)).logits).abs().max() > 1e-3


def test_where_sizes_must_stay_symbolic_a_mask_known_at_one_size_is_looked_at_when_it_runs():
    model = Masked(_multiplied)
    run = passed_alone(model)
    for seq in (12, 13):
        x = states(seq)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(run(x), model.attention(x))


@pytest.mark.parametrize("make", [*BY_RULE, _within_16])
def test_where_sizes_must_stay_symbolic_a_mask_by_rule_is_served(make):
    model, x = Masked(make), states()
    torch._dynamo.mark_dynamic(x, 1)
    torch.testing.assert_close(passed_alone(model)(x), model.attention(x))


def _banded(x):
    return _causal(x) & ~_causal(x).tril(-4)


def _strictly(x):
    return (_rows(x)[:, None] > _rows(x))[None, None]


def _written(x):
    mask = _causal(x).clone()
    mask[0][0][5, 0] = False
    return mask


def _filled(x):
    mask = _causal(x).clone()
    mask[0].squeeze(0)[5:].fill_(True)
    return mask


def _into_out(x):
    mask = _lower(x)
    torch.logical_and(mask, _rows(x) > 3, out=mask)
    return mask


def _through_relu(x):
    mask = _additive(x).contiguous()
    F.relu(mask, inplace=True)
    return mask


def _after_the_writes(x):
    mask = _lower(x)
    view = mask.view(-1)
    torch.einsum("i->i", view).zero_()
    return mask


def _dense(x):
    return torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)


def _wide(x):
    return torch.ones(x.shape[1], 2 * x.shape[1], dtype=torch.bool).tril()[None, None]


def _soft(x):
    return torch.full((1, 1, x.shape[1], x.shape[1]), -1.0).triu(1)


def _small(x):
    return torch.ones(4, 4, dtype=torch.bool).tril()[None, None]


def _single(x):
    return torch.ones(1, 1, 1, 1, dtype=torch.bool)


def _one_row(x):
    return torch.ones(x.shape[1], dtype=torch.bool)


def _integers(x):
    return _causal(x).long()


def _three_heads(x):
    return _causal(x).expand(1, 3, -1, -1)


def _five_dimensions(x):
    return _causal(x)[None]


def _by_chance(x):
    return _causal(x) & (torch.rand(x.shape[1], x.shape[1]) >= 0)


AS_EAGER = [
    _banded, _strictly, _dense, _soft, _written, _filled, _into_out, _through_relu,
    _after_the_writes, _by_chance, _single, lambda x: _causal(x) & (x[:, None, :, :1] < 9),
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("make", AS_EAGER)
def test_a_mask_that_is_not_proven_causal_is_served_or_refused_as_in_eager(make, dynamic):
    model = Masked(make)
    run = passed_alone(model, dynamic=dynamic)
    try:
        expected = model(states())
    except UnservedMarkError as error:
        reason = str(error).partition("cannot run: ")[2].partition(":")[0]
        with pytest.raises(UnservedMarkError, match=re.escape(reason)):
            run(states())
        return
    torch.testing.assert_close(run(states()), expected)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_wide, "12 queries and 24 keys, and the attention 12 and 12"),
        (_small, "it has 4 queries and 4 keys, and the attention 12 and 12"),
        (_one_row, "it has 1 dimensions, and a mask [12, 12] or one with heads and batch"),
        (_five_dimensions, "it has 5 dimensions"),
        (_integers, "it is of torch.int64, and scaled_dot_product_attention takes truth values"),
        (_three_heads, "it is of shape [1, 3, 12, 12], and the query has 2 rows of 4 heads"),
    ],
)
def test_a_mask_of_another_shape_or_kind_is_refused(make, text):
    message = refusal_of(Masked(make), states())
    assert "its attention mask is not served" in message
    assert text in message
    with pytest.raises(UnservedMarkError, match=re.escape(text)):
        Masked(make)(states())


@pytest.mark.parametrize("make", [_small, _one_row, _integers])
def test_it_is_refused_under_dynamic_sizes_too(make):
    run = passed_alone(Masked(make), dynamic=True)
    message = refusal_in(lambda: run(states()))
    assert "its attention mask is not served" in message


def test_proofs_leave_the_random_state_alone():
    after = []

    def then(gm, _example_inputs):
        after.append(torch.get_rng_state())
        return gm

    x = states()
    run = torch.compile(Masked(_by_chance), backend=Passed(then), fullgraph=True)
    before = torch.get_rng_state()
    run(x)
    assert torch.equal(before, after[0])


def test_a_small_mask_is_refused_where_the_sizes_agree_by_chance():
    """A mask of 12 rows whatever the sequence is causal for 12 tokens alone."""
    model = Masked(lambda x: torch.ones(12, 12, dtype=torch.bool).tril())
    run = torch.compile(model, backend=Passed(eager), dynamic=True)
    torch.testing.assert_close(run(states(12)), model.attention(states(12)))
    assert "it has 12 queries and 12 keys" in refusal_in(lambda: run(states(13)))


@pytest.mark.parametrize("make", [_dense, _causal, _banded])
def test_a_mask_for_a_module_that_is_not_causal_is_served(make):
    model, x = Masked(make, is_causal=False), states()
    torch.testing.assert_close(passed_alone(model)(x), model(x))
    same = torch.equal(model(x), model.attention(x))
    assert same == (make is _dense)


def _padding(ids, left):
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_padding_is_served_and_another_is_no_other_graph(checkpointed):
    model, ids = mark_layers(llama(), 0, 1, window=(6, 3)).train(checkpointed), tokens()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backend = Counted()
    run = torch.compile(model, backend=backend, fullgraph=True)
    for left in (0, 5, 23):
        given = _padding(ids, left)
        got = run(ids, **given).logits
        torch.testing.assert_close(got, model(ids, **given).logits)
        torch.testing.assert_close(got[1], model(ids).logits[1])
    assert backend.graphs == 1


def test_layers_that_share_a_mask_look_at_it_once():
    model, ids, seen = mark_layers(llama(), 0, 1, window=(6, 3)), tokens(), []

    def look(gm, example_inputs):
        serve_marks(gm)
        seen.extend(n for n in gm.graph.nodes if n.target is RANGES_OP)
        return gm.forward

    torch.compile(model, backend=look, fullgraph=True)(ids, **_padding(ids, 3))
    assert len(seen) == 1


def test_packed_documents_are_served():
    model, ids = mark_layers(llama(), 0, window=(6, 3)), tokens(batch=1)
    positions = torch.arange(ids.shape[1]).remainder(9)[None]
    got = passed_alone(model)(ids, position_ids=positions).logits
    torch.testing.assert_close(got, model(ids, position_ids=positions).logits)
    torch.testing.assert_close(got[:, 9:18], model(ids[:, 9:18]).logits)


def test_a_mask_with_holes_is_refused_when_it_runs():
    model, ids = mark_layers(llama(), 0, window=(6, 3)), tokens()
    holes = {"attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([9]), 0)}
    for run in (model, passed_alone(model)):
        with pytest.raises(UnservedMarkError, match=r"keys that are not one range.*unmark\(\)"):
            run(ids, **holes)


def test_a_mask_carried_through_a_loop_is_not_taken_for_the_one_it_starts_as():
    body = randomize(mark(attention(llama(), 0), window=(5, 3)))

    def step(i, x, mask):
        turned = body(x, position_embeddings=_no_rotation(x), attention_mask=mask)[0]
        return i + 1, turned, mask & (torch.arange(12) > 3)

    def run(x):
        start = (torch.zeros((), dtype=torch.long), x, _causal(x).expand(2, -1, -1, -1).clone())
        loop = torch._higher_order_ops.while_loop
        return loop(lambda i, x, mask: i < 2, step, start)[1]

    with torch.no_grad():
        got = torch.compile(run, backend=Passed(eager), fullgraph=True)(states())
        expected, mask = states(), _causal(states()).expand(2, -1, -1, -1)
        for turn in range(2):
            _, expected, mask = step(turn, expected, mask)
    torch.testing.assert_close(got, expected)


def _no_rotation(x):
    shape = (x.shape[0], x.shape[1], 8)
    return torch.ones(shape), torch.zeros(shape)


def _rule(make, *shapes):
    """Read the rule of a mask that Dynamo traced with symbolic sizes."""
    found = []

    def backend(gm, example_inputs):
        output = next(n for n in gm.graph.nodes if n.op == "output")
        try:
            found.append(read_rule(output.args[0][0], {}))
        except Unread:
            found.append(None)
        return gm.forward

    torch.compile(make, backend=backend, dynamic=True, fullgraph=True)(torch.zeros(*shapes))
    return found[0]


CAUSAL = Claims(frozenset({Linear((1, -1))}))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (_lower, CAUSAL),
        (lambda x: _rows(x) <= _rows(x)[:, None], CAUSAL),
        (lambda x: ~(_rows(x) > _rows(x)[:, None]), CAUSAL),
        (lambda x: (_rows(x) + 3)[None, :] < _rows(x).unsqueeze(-1) + 4, CAUSAL),
        (lambda x: _lower(x) & (_rows(x) >= 0), CAUSAL),
        (lambda x: _lower(x) | _rows(x).lt(0), CAUSAL),
        (lambda x: _lower(x) & False, Claims(None)),
        (lambda x: torch.logical_or(_lower(x), torch.ones((), dtype=torch.bool)), Claims()),
        (lambda x: _windowed(16, x)[0, 0], Claims(CAUSAL.all_of | {Linear((-1, 1), 15)})),
        (lambda x: _rows(x)[1:] == _rows(x)[:-1] + 1, Claims()),
        (lambda x: _rows(x)[1:] != _rows(x)[:-1], Claims()),
        (lambda x: _rows(x).to(torch.int8) >= 0, None),  # 128 is -128 there
        (lambda x: _rows(x).float() >= 0, None),
        (lambda x: _rows(x)[_rows(x) - 1] >= 0, None),  # the first index counts from the end
        (lambda x: _rows(x) <= x.shape[1] // 2, None),
        (lambda x: _rows(x) % 2 == 0, None),
        (lambda x: (_rows(x) <= 2) | (_rows(x) > 4), None),
        (lambda x: torch.add(_rows(x), 1, alpha=2) >= 1, None),
        (lambda x: x.sum() > 0, None),
    ],
)
def test_rules_are_read_or_left_unread(make, rule):
    assert _rule(make, 2, 12) == rule


def test_what_a_rule_says_is_what_its_mask_holds():
    """Each rule that is read agrees with the mask itself, at several sizes."""
    for make in (*BY_RULE, _within_16, _strictly, _dense):
        torch._dynamo.reset()
        rule = _rule(make, 2, 12, 4)
        for seq in (1, 2, 5, 19):
            mask = make(torch.zeros(2, seq, 4))
            mask = mask if mask.dtype == torch.bool else mask == 0
            grid = torch.meshgrid(*(torch.arange(s) for s in mask.shape), indexing="ij")
            holds = torch.full(mask.shape, rule.all_of is not None)
            for claim in rule.all_of or ():
                parts = [c * g for c, g in zip(claim.coefs, grid, strict=True)]
                holds &= sum(parts, torch.tensor(claim.const)) >= 0
            assert torch.equal(holds, mask), make.__name__


def test_a_graph_without_example_tensors_has_no_rule():
    gm = fx.symbolic_trace(lambda x: x <= x)
    with pytest.raises(Unread):
        read_rule(next(n for n in gm.graph.nodes if n.op == "call_function"), {})


def test_a_mask_made_by_hand_is_refused_in_front_of_the_call():
    message = refusal_of(
        Masked(_causal, attend=lambda q, k, v, **_: sdpa(q, k, v, attn_mask=band(12, 4))), states()
    )
    assert "its forward attends with another of its own making" in message
