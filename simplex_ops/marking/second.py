"""simplex_k2, simplex_v2 and the norm of k2: layers that start where marking started them.

Models initialise their layers more than once: when they are built, when a checkpoint lacks keys,
when they leave the meta device. A layer that starts at zero would then be drawn at random, and the
marked model would start as something else, in silence. So these layers put themselves back at their
start whenever they are initialised by

- `reset_parameters()`, and `model.apply(fn)` with a fn that writes into them;
- leaving the meta device: `to_empty`, and whoever puts a weight in place of one on meta, such as
  transformers' from_pretrained for keys that a checkpoint lacks;
- transformers' `init_weights`, which asks each module whether it was initialised
  (`_is_hf_initialized`, of modules and of weights, in 5.23).

A loop that writes into `model.parameters()` one by one is beyond that: call reset_parameters()
after it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Starting(nn.Module):
    """A layer that comes back to its start when it is initialised."""

    starts_at_zero = False

    @property
    def _is_hf_initialized(self) -> bool:
        return True  # transformers then leaves the layer to itself

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, initialized: bool) -> None:
        if not initialized:  # whoever asks for a new start gets it
            self.start()

    def start(self) -> None:
        """Write the start into the parameters."""
        if self.starts_at_zero:
            for parameter in self.parameters(recurse=False):
                nn.init.zeros_(parameter)
        else:
            super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]

    def reset_parameters(self) -> None:
        """Start anew."""
        self.start()

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Run fn, and start anew where it wrote into the parameters and the start is zero."""
        if not self.starts_at_zero or any(p.is_meta for p in self.parameters()):
            return super().apply(fn)
        before = [(p, _values(p).clone()) for p in self.parameters(recurse=False)]
        super().apply(fn)
        if any(not torch.equal(_values(p), was) for p, was in before):
            self.start()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        were_meta = [p.is_meta for p in self.parameters(recurse=False)]
        super()._apply(fn, recurse)
        if any(were_meta) and not any(p.is_meta for p in self.parameters(recurse=False)):
            self.start()
        return self

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args: Any, **kwargs: Any
    ) -> None:
        self.__dict__["_loading"] = True
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            del self.__dict__["_loading"]

    def __setattr__(self, name: str, value: Any) -> None:
        was = self.__dict__.get("_parameters", {}).get(name)
        super().__setattr__(name, value)
        from_nowhere = (
            was is not None
            and was.is_meta
            and isinstance(value, Tensor)
            and not value.is_meta
            and "_loading" not in self.__dict__
            and not getattr(value, "_is_hf_initialized", False)
        )
        if from_nowhere and not any(p.is_meta for p in self.parameters(recurse=False)):
            with torch.no_grad():
                self.start()


class SecondProjection(Starting, nn.Linear):
    """A linear layer that makes k2 or v2."""

    def __init__(self, starts_at_zero: bool, *sizes: Any, **how: Any) -> None:
        # Before nn.Linear's own __init__, which calls reset_parameters.
        self.__dict__["starts_at_zero"] = starts_at_zero
        super().__init__(*sizes, **how)
        self.starts_at_zero = starts_at_zero


class SecondNorm(Starting, nn.RMSNorm):
    """The norm of k2 over head_dim."""

    def __init__(self, starts_at_zero: bool, *sizes: Any, **how: Any) -> None:
        self.__dict__["starts_at_zero"] = starts_at_zero
        super().__init__(*sizes, **how)
        self.starts_at_zero = starts_at_zero


def _values(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter."""
    return getattr(parameter, "_local_tensor", parameter).detach()
