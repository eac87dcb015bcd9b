"""The mode under which a marked module's own forward runs in eager code."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from simplex_ops.marking.another import Another
from simplex_ops.marking.cached import SecondPair
from simplex_ops.marking.call import SDPA, SdpaCall, UnservedMarkError, refusal, with_mask
from simplex_ops.marking.multi_head import named, refuse_unserved, spelled_out
from simplex_ops.marking.naming import running_as
from simplex_ops.marking.ranges import RANGES_OP
from simplex_ops.marking.recomputation import Surroundings, why_recomputed
from simplex_ops.marking.setting import Mark
from simplex_ops.marking.unrepeated import Unrepeated


class InPlaceOfSdpa(TorchFunctionMode):
    """Runs simplex::attn where scaled_dot_product_attention is called, and counts the calls.

    F.multi_head_attention_forward is spelled out, so that it makes one.
    """

    def __init__(
        self, module: nn.Module, setting: Mark, pair: SecondPair, mask: Tensor | None
    ) -> None:
        super().__init__()
        self.module, self.setting, self.pair = module, setting, pair
        self.mask = mask  # given to the module, and taken over by the mark
        self.entry = Surroundings.here()
        self.unrepeated = Unrepeated()
        self.calls = 0
        self.sizes: tuple[int, ...] = ()  # of the scores, had it any
        self.another = Another()

    def refuse_another(self) -> None:
        """Raise where the module attended otherwise than by the one call that was taken over."""
        if self.calls != 1:
            raise UnservedMarkError(
                f"a marked module, {running_as(self.module)}, called scaled_dot_product_attention "
                f"{self.calls} times in one forward, and a mark takes over exactly one call: "
                'load the model with attn_implementation="sdpa", or compile it'
            )
        name = self.another.beside(self.sizes)
        if name is not None:
            raise UnservedMarkError(
                f"a marked module, {running_as(self.module)}, cannot run: it attends by {name} "
                "too, and a mark takes over exactly one attention: mark a module that attends once"
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            refuse_unserved(named(*args, **(kwargs or {})), running_as(self.module))
            with self:
                return spelled_out(*args, **(kwargs or {}))
        if func is not SDPA:
            out = func(*args, **(kwargs or {}))
            self.unrepeated.note(func, args, kwargs or {}, out)
            self.another.note(func, args, kwargs or {}, out)
            return out
        self.calls += 1
        setting, pair = self.setting, self.pair
        call, found = with_mask(SdpaCall.bind(args, kwargs or {}), self.mask)
        call = self.unrepeated.folded(call, pair.k2.shape[1])
        reason = (
            found
            or refusal(call, pair.k2, setting.is_causal, setting.without_dropout, pair.expected)
            or why_recomputed(self.entry)
        )
        if reason is not None:
            raise UnservedMarkError(
                f"a marked module, {running_as(self.module)}, cannot run: {reason}"
            )
        self.sizes = (*call.query.shape[:3], call.key.shape[2])
        out, _ = torch.ops.simplex.attn(
            call.query, call.key, pair.k2, call.value, pair.v2, setting.w1, setting.w2,
            scale=call.scale, is_causal=setting.is_causal, form=setting.form,
            k2_bias=setting.k2_bias, v2_bias=setting.v2_bias,
            kv_bounds=self._bounds(call), q_start=pair.q_start,
        )  # fmt: skip
        return out

    def _bounds(self, call: SdpaCall) -> Tensor | None:
        if call.attn_mask is None:
            return None
        q, keys = call.query, call.key.shape[2]
        try:
            return RANGES_OP(
                call.attn_mask, q.shape[0], q.shape[2], keys,
                is_causal=self.setting.is_causal, q_start=self.pair.q_start,
            )  # fmt: skip
        except UnservedMarkError as error:
            raise UnservedMarkError(
                f"a marked module, {running_as(self.module)}, cannot run: {error}"
            ) from None
