"""The support table: what its cells say is what happens, and the document holds all of it."""

import re

import pytest
import torch
from tiny_llama import Attention, matrix_products
from torch import nn

from tools.support.cells import COLUMNS, Column, Outcome, outcome
from tools.support.models import ROWS, Row, SelfAttention, states
from tools.support.table import README, markdown, written

BY_NAME = {row.name: row for row in ROWS}


def said(row: Row) -> list[str]:
    return [outcome(row, column).said for column in COLUMNS]


@pytest.mark.slow
def test_attention_by_hand_is_served_in_every_way():
    assert said(BY_NAME["a module that calls SDPA"]) == [
        "–" if column.of_generators else "yes" for column in COLUMNS
    ]


def test_a_refusal_is_told_with_its_reason():
    row = Row("by softmax", lambda: nn.Sequential(Attention(matrix_products)), states)
    titles = ("eager, infer", "compiled, infer, static")
    eager, compiled = (outcome(row, c) for c in COLUMNS if c.title in titles)
    assert eager.said == compiled.said == "refused"
    assert "called scaled_dot_product_attention 0 times" in eager.why
    assert "mark it with is_causal=False" in compiled.why


class Forgets(nn.Module):
    """A model whose marked attention has no effect, and one whose answers differ by chance."""

    def __init__(self, by_chance: bool) -> None:
        super().__init__()
        self.attention, self.by_chance = Attention(), by_chance

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.attention(x)
        return out + torch.rand(()) if self.by_chance else x * self.attention.q_proj.weight[0]


@pytest.mark.parametrize("by_chance", [False, True])
def test_a_wrong_answer_fails_its_cell(by_chance):
    (infer,) = (column for column in COLUMNS if column.title == "eager, infer")
    found = outcome(Row("wrong", lambda: Forgets(by_chance), states), infer)
    assert found.said == "fails"
    assert found.why.startswith("AssertionError: ")


def test_what_fails_without_a_mark_too_is_told_apart():
    def fails(row):
        assert row.how is None or row.name != "marked", "no such thing"
        raise NotImplementedError("by no one")

    column = Column("compiled", fails)
    assert outcome(Row("any", SelfAttention), column).said == "nor unmarked"
    assert outcome(Row("marked", SelfAttention), column).said == "fails"


def test_a_library_that_is_missing_is_named():
    def build():
        import no_such_library

        return no_such_library

    row = Row("of a library", build, states)
    assert outcome(row, COLUMNS[0]) == Outcome("not installed", "No module named 'no_such_library'")


def test_reasons_are_numbered_below_the_table():
    found = {
        "one": [Outcome("yes"), Outcome("refused", "why"), Outcome("refused", "other")],
        "two": [Outcome("refused", "why")],
    }
    text = markdown(found, "torch 1")
    assert (
        "| one | yes | refused (1) | refused (2) |\n| two | refused (1) |\n\n1. why\n2. other"
        in text
    )
    page = written(text, "before\n<!-- made by tools.support -->\nold\n<!-- end -->\nafter")
    assert page == f"before\n<!-- made by tools.support -->\n{text}\n<!-- end -->\nafter"
    with pytest.raises(ValueError, match="no place for the table"):
        written(text, "another page")


def test_the_document_holds_every_model_and_every_way_and_no_failure():
    page = README.read_text()
    table = [line.split(" | ") for line in page.splitlines() if re.match(r"\| (model|\S)", line)]
    head = next(i for i, line in enumerate(table) if line[0] == "| model")
    assert [cell.removesuffix(" |") for cell in table[head][1:]] == [c.title for c in COLUMNS]
    rows = [line for line in table[head + 2 :] if len(line) == len(COLUMNS) + 1]
    assert [line[0].removeprefix("| ") for line in rows] == [row.name for row in ROWS]
    assert not any("fails" in cell for line in rows for cell in line[1:])
