"""Marked models on two ranks: DDP, FSDP2, checkpoints; what was marked too late is refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from tiny_llama import assert_same, llama, train_step
from torch.distributed import checkpoint

from simplex_ops import mark_like
from simplex_ops.testing import assert_within_budget

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every scenario, two processes at once, and give the folder with what they said."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, two_ranks.__file__, str(rank), str(folder)], env=environment
        )
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(590) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def of_one_process(double: bool = False) -> list[dict[str, torch.Tensor]]:
    """Return, for each rank, its own logits and the mean of both ranks' gradients."""
    model = two_ranks.marked()
    model = model.double() if double else model
    steps = [train_step(model, model, two_ranks.batch(rank)) for rank in (0, 1)]
    mean = {name: (value + steps[1][name]) / 2 for name, value in steps[0].items()}
    return [{**mean, "logits": one["logits"]} for one in steps]


@pytest.mark.parametrize("scenario", ["replicated_eager", "replicated_compiled", "sharded_eager"])
def test_two_ranks_compute_what_one_process_does(said, scenario):
    for found, expected in zip(said, of_one_process(), strict=True):
        got = found[scenario]
        if scenario.endswith("compiled"):
            got, names = got
            assert names == [two_ranks.NAME]
        assert_same(got, expected)


def test_blocks_compiled_alone_in_bfloat16_are_as_exact_as_eager_and_named_in_full(said):
    for found, exact in zip(said, of_one_process(double=True), strict=True):
        got, names = found["sharded_bfloat16_compiled"]
        assert names == [two_ranks.NAME]
        rounded = found["sharded_bfloat16"]
        assert got.keys() == exact.keys()
        for name, value in exact.items():
            # Gradients leave bfloat16 for the sum over ranks; what made them does not.
            got_bf16, rounded_bf16 = (t.bfloat16() for t in (got[name], rounded[name]))
            assert_within_budget(name, got_bf16, value, rounded_bf16)


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("replicated_and_split", f"{two_ranks.NAME}: no scaled_dot_product_attention"),
        ("replicated_and_split", "set torch._dynamo.config.optimize_ddp = False"),
        ("marked_after_replicated", "layer 1 is part of a model in DistributedDataParallel"),
        ("marked_after_sharded", "layer 1's k_proj is a DTensor: the model was sharded already"),
    ],
)
def test_a_split_and_a_late_mark_are_refused_by_name(said, scenario, text):
    for found in said:
        assert text in found[scenario]


def test_a_checkpoint_of_two_ranks_goes_on_on_one_with_the_same_loss(folder, said):
    model = llama(seed=9)
    assert list(mark_like(model, folder / "saved").marked) == [two_ranks.NAME]
    held = {"model": model.state_dict()}
    checkpoint.load(held, checkpoint_id=folder / "saved", no_dist=True)
    model.load_state_dict(held["model"])
    loss = two_ranks.loss_of(model.train(), two_ranks.batch(0)).item()
    for found in said:
        assert found["sharded_and_saved"] == pytest.approx(loss, rel=1e-5)
