"""Plain training of one model: AdamW, a warm-up and a cosine, validation on held-out files."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo.corpus import even_batches, random_batch
from tools.demo.llama import Setting

VALIDATION_BATCHES = 6


@dataclass
class Curve:
    """What one run gave: loss on held-out files (nats per byte) by tokens seen, and its pace."""

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of training alone

    @property
    def tokens_per_second(self) -> float:
        return self.tokens[-1] / self.seconds


class Trainer:
    """One model, the data that it is trained on, and the device where this happens.

    `forward` is the model, or what torch.compile made of it. Call `begin`, then `step` as often as
    it was told, and `validate` where a point of the curve is wanted.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        model: nn.Module,
        setting: Setting,
        data: tuple[Tensor, Tensor],
        device: torch.device,
    ) -> None:
        self.forward, self.model, self.setting, self.device = forward, model, setting, device
        self.training, held_out = data
        self.validation = even_batches(held_out, setting.batch, setting.seq, VALIDATION_BATCHES)
        self.curve, self.steps = Curve(), 0

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of [batch, seq + 1] tokens, in nats per byte."""
        tokens = tokens.to(self.device)
        logits = self.logits(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    def logits(self, tokens: Tensor) -> Tensor:
        """Return [batch, seq, vocabulary].

        Gradients stay enabled outside training too: without them the same model would be compiled
        once more, for longer than all of validation takes.
        """
        half = self.setting.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.setting.dtype, enabled=half):
            return self.forward(input_ids=tokens, use_cache=False).logits

    def warm_up(self) -> tuple[float, float]:
        """Compile, without an update; return (seconds to compile, seconds for a step)."""
        tokens = even_batches(self.training, self.setting.batch, self.setting.seq, 1)[0]
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            self.loss(tokens).backward()
            self._synchronize()
            seconds.append(time.perf_counter() - start)
        self.model.zero_grad(set_to_none=True)
        return seconds[0], min(seconds[1:])

    def begin(self, steps: int, *, seed: int) -> None:
        """Make the optimizer for `steps` updates; the seed gives the order of the data."""
        self.steps = 0
        self.curve = Curve()
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.setting.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: warm_cosine(step, steps)
        )

    def step(self) -> float:
        """Make one update and return the loss before it, in nats per byte."""
        start = time.perf_counter()
        setting = self.setting
        loss = self.loss(random_batch(self.training, setting.batch, setting.seq, self._generator))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        value = loss.item()
        self.steps += 1
        self.curve.seconds += time.perf_counter() - start
        return value

    def validate(self) -> float:
        """Return the loss on held-out files, in nats per byte, and add it to the curve."""
        loss = sum(self.loss(batch).item() for batch in self.validation) / len(self.validation)
        self.curve.tokens.append(self.steps * self.setting.tokens_per_step)
        self.curve.loss.append(loss)
        return loss

    def complete(self, prompts: list[str], *, length: int, seed: int = 0) -> list[str]:
        """Return each prompt continued to the end of its line, by at most `length` bytes.

        The batch keeps the shape that training compiled: rows repeat the prompts, and what stands
        right of a row's end is padding that causal attention does not see.
        """
        setting = self.setting
        generator = torch.Generator().manual_seed(seed)
        rows = [list(prompts[i % len(prompts)].encode()) for i in range(setting.batch)]
        tokens = torch.zeros(setting.batch, setting.seq, dtype=torch.long)
        ends = torch.tensor([len(row) for row in rows])
        for row, end, text in zip(tokens, ends.tolist(), rows, strict=True):
            row[:end] = torch.tensor(text)
        every = torch.arange(setting.batch)
        for _ in range(min(length, setting.seq - int(ends.max()))):
            logits = self.logits(tokens.to(self.device)).detach().float().cpu()[every, ends - 1]
            drawn = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
            tokens[every, ends] = drawn[:, 0]
            ends += 1
        whole = (bytes(t[:end].tolist()) for t, end in zip(tokens, ends.tolist(), strict=True))
        lines = [text.decode(errors="replace") for text in whole]
        return [
            prompt + line[len(prompt) :].partition("\n")[0]
            for prompt, line in zip(prompts, lines, strict=False)
        ]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def warm_cosine(step: int, steps: int) -> float:
    """Return the rate's factor: up over a twentieth of the steps, then a cosine to 0.05."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
