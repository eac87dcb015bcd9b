"""generate() of marked models on a GPU, where it compiles its steps of itself, with CUDA graphs."""

import pytest
import torch
from recomputed import generated, generating, left_padded, recomputed
from tiny_llama import tokens

import simplex_ops


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "cache"),
    [
        *(("llama", cache) for cache in ("dynamic", "static", "static in eager code", "beams")),
        ("gpt2", "static"),
        ("mistral", "dynamic"),
        ("mistral", "static"),
    ],
)
def test_tokens_are_those_of_the_whole_prefix(family, cache):
    model, ids = generating(family).float().cuda(), tokens(seq=10, device="cuda")
    mask, how = left_padded(ids), {}
    if "static" in cache:
        how = {"cache_implementation": "static", "disable_compile": cache != "static"}
    if cache == "beams":
        how = {"num_beams": 3}
    with simplex_ops.enable():
        if cache == "beams":
            expected = generated(model, ids, mask, 12, use_cache=False, **how).sequences
            assert torch.equal(generated(model, ids, mask, 12, **how).sequences, expected)
            return
        expected, logits = recomputed(model, ids, mask, 12)
        for _ in range(2):  # CUDA graphs are recorded, then replayed
            got = generated(model, ids, mask, 12, **how)
            assert torch.equal(got.sequences, expected)
            torch.testing.assert_close(torch.stack(got.logits, 1), logits, rtol=1e-4, atol=1e-4)
    if cache == "static":
        assert len(simplex_ops.last_report().rewritten) == 2


@pytest.mark.gpu
@torch.no_grad()
def test_a_prompt_in_bfloat16_goes_on_as_the_whole():
    model = generating().bfloat16().cuda()
    exact, ids = generating(), tokens(seq=200)
    whole, wanted = model(ids.cuda(), use_cache=False).logits, exact(ids, use_cache=False).logits
    out = model(ids[:, :190].cuda(), use_cache=True)
    steps = [out.logits]
    for place in range(190, 200):
        one = ids[:, place : place + 1].cuda()
        steps.append(model(one, past_key_values=out.past_key_values, use_cache=True).logits)
    off, budget = (
        (logits.cpu().double() - wanted).abs().max().item()
        for logits in (torch.cat(steps, 1), whole)
    )
    assert off <= 2 * budget
