"""Match3: for each of N numbers, do any two of them, with it, add up to 0 modulo M?

x_i + x_j + x_k = 0 mod M, where j and k may be equal, to each other and to i. Sanford, Hsu and
Telgarsky (2023) show that a layer of ordinary attention needs a width that grows with N for this;
theorem 5.1 of Roy et al. (2025), that one 2-simplicial head of width 7 does it. `constructed` is
such a head.

The share of numbers that have a match depends on N and M, so an accuracy is read beside that of
naming the more frequent answer always.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simplex_ops import SimplicialAttention
from tools.experiments.model import Kind, Shape
from tools.experiments.train import Setting, Training

WIDTH = 7  # of the constructed head
_ANGLE_COS, _ANGLE_SIN, _ONE, _BLANK = range(4)  # what the constructed head's input holds
_SHARPNESS = 4.0  # nats, beyond those needed, between the right answer and 1/2


@dataclass(frozen=True)
class Match3:
    """The task: `length` numbers below `modulus`, and for each whether it has a match."""

    modulus: int
    length: int

    @property
    def fields(self) -> tuple[int, ...]:
        return (self.modulus,)

    @property
    def classes(self) -> int:
        return 2

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return numbers [batch, length, 1] and whether each has a match [batch, length]."""
        size, device = (batch, self.length), generator.device
        numbers = torch.randint(self.modulus, size, generator=generator, device=device)
        return numbers[..., None], has_match(numbers, self.modulus).long()


def has_match(numbers: Tensor, modulus: int) -> Tensor:
    """Return for each x_i of [batch, N] whether x_i + x_j + x_k = 0 mod M for some j, k."""
    pairs = numbers[:, :, None] + numbers[:, None]
    wanted = (-numbers) % modulus
    return (pairs.flatten(1)[:, None] % modulus == wanted[..., None]).any(-1)


def constructed(modulus: int, length: int, *, form: str = "trilinear") -> SimplicialAttention:
    """Return one head of width 7 that computes Match3: out[..., 0] > 1/2 where there is a match.

    It reads `constructed_input`. A pair's logit is cos(2π (x_i + x_j + x_k) / M), four products of
    three in the trilinear form and two determinants in the determinant form, or a threshold for
    the pair of the blank token with itself; the value is 1 for every pair but that. The scale
    leaves next to nothing of the softmax to pairs below the largest logit.
    """
    nearest = math.cos(2 * math.pi / modulus) if modulus > 1 else -1.0
    threshold = (1 + max(nearest, 0.0)) / 2  # between a match and the nearest miss
    scale = (math.log((length + 1) ** 2) + _SHARPNESS) / (1 - threshold)
    head = SimplicialAttention(
        WIDTH, 1, window=None, form=form, is_causal=False, scale=scale, k2_bias=0.0, v2_bias=0.0
    )
    cos, sin, one, blank = _ANGLE_COS, _ANGLE_SIN, _ONE, _BLANK
    # Row by row, what stands in each dimension of the head: (weight, input).
    if form == "trilinear":
        # cos(a+b+c) = ccc - css - scs - ssc
        q = [(1, cos), (-1, cos), (-1, sin), (-1, sin), (0, one), (0, one)]
        k1 = [(1, cos), (1, sin), (1, cos), (1, sin), (0, one), (0, one)]
        k2 = [(1, cos), (1, sin), (1, sin), (1, cos), (0, one), (0, one)]
    else:
        # cos a (cos b cos c - sin b sin c), and -sin a (sin b cos c + cos b sin c)
        q = [(1, cos), (0, one), (0, one), (-1, sin), (0, one), (0, one)]
        k1 = [(0, one), (1, cos), (1, sin), (0, one), (1, sin), (-1, cos)]
        k2 = [(0, one), (1, sin), (1, cos), (0, one), (1, sin), (1, cos)]
    q, k1, k2 = [*q, (threshold, one)], [*k1, (1, blank)], [*k2, (1, blank)]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        for projection, rows in ((head.q_proj, q), (head.k1_proj, k1), (head.k2_proj, k2)):
            for row, (weight, column) in enumerate(rows):
                projection.weight[row, column] = weight
        for projection in (head.v1_proj, head.v2_proj):
            projection.weight[0, one], projection.weight[0, blank] = 1.0, -1.0
        head.out_proj.weight[0, 0] = 1.0
    return head


def constructed_input(numbers: Tensor, modulus: int) -> Tensor:
    """Return [batch, N + 1, 7] for numbers [batch, N]: their angles, and the blank token last."""
    batch, length = numbers.shape
    x = torch.zeros(batch, length + 1, WIDTH)
    angle = numbers * (2 * math.pi / modulus)
    x[:, :-1, _ANGLE_COS], x[:, :-1, _ANGLE_SIN] = angle.cos(), angle.sin()
    x[..., _ONE] = 1.0
    x[:, -1, _BLANK] = 1.0
    return x


def settings(seeds: int, *, quick: bool) -> Iterator[tuple[str, Setting]]:
    """Yield (part, setting) of every run: all first seeds of a part, then all second ones."""
    for part, rows in (_QUICK if quick else _PARTS).items():
        for seed in range(seeds):
            for task, shape, training in rows:
                yield part, Setting(task, shape, training, seed)


def steps(setting: Setting) -> int:
    return setting.training.steps


def say(line: dict[str, Any]) -> str:
    """Return one run's outcome in words."""
    task, shape = line["setting"]["task"], line["setting"]["shape"]
    result = line["result"]
    return (
        f"Match3 mod {task['modulus']}, {task['length']} numbers, {', '.join(shape['layers'])}, "
        f"width {shape['width']}, heads {shape['heads']}: accuracy {result['accuracy']:.3f} "
        f"(majority {result['majority']:.3f}) at step {result['steps']}, {result['seconds']:.0f} s"
    )


Row = tuple[Match3, Shape, Training]
ORDINARY: Kind = "ordinary"
SIMPLICIAL: Kind = "2-simplicial"
_STEPS = 2400


def _arms(task: Match3, *, width: int = 64, heads: int = 1, steps: int = _STEPS) -> list[Row]:
    shapes = [Shape((kind,), width, heads) for kind in (ORDINARY, SIMPLICIAL)]
    return [(task, shape, Training(steps)) for shape in shapes]


_PARTS: dict[str, list[Row]] = {
    "pilot": [
        *_arms(Match3(37, 8)),
        (Match3(37, 8), Shape((ORDINARY, ORDINARY), 64, 4), Training(_STEPS)),
    ],
    # About as many pairs as residues, so that neither answer is rare.
    "modulus": [row for modulus in (7, 13, 19, 53) for row in _arms(Match3(modulus, 8))],
    "length": [
        row
        for length, modulus in ((4, 11), (12, 79), (16, 137))
        for row in _arms(Match3(modulus, length))
    ],
    "heads": [row for heads in (2, 4, 8) for row in _arms(Match3(37, 8), heads=heads)],
    "width": [row for width in (16, 32, 128, 256) for row in _arms(Match3(37, 8), width=width)],
    # Where a head may succeed within the cap: four numbers, twice the steps.
    "width-of-four": [
        row
        for width in (8, 16, 32, 64, 128)
        for row in _arms(Match3(11, 4), width=width, steps=2 * _STEPS)
    ],
}
_QUICK: dict[str, list[Row]] = {"quick": _arms(Match3(5, 3), steps=300)}
PARTS = tuple(_PARTS)
