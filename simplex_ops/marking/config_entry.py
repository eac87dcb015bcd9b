"""What config.json says of a model's marks, for people to read; loading reads the weights' own."""

from typing import Any

from torch import nn

from simplex_ops.marking.naming import described
from simplex_ops.marking.setting import Mark

NAME = "simplex_ops"
_LOADS = "simplex_ops.from_pretrained(AutoModelForCausalLM, path), or your model's class"


def note(module: nn.Module, mark: Mark) -> None:
    """Say in the config that a module shares with its model, where it has one, how it is marked."""
    config: Any = getattr(module, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return
    entry = _entry(config)
    entry["marks"][described(module)] = {
        "window": [mark.w1, mark.w2],
        "form": mark.form,
        "k2_bias": mark.k2_bias,
        "v2_bias": mark.v2_bias,
        "is_causal": mark.is_causal,
        "attention_dropout": 0.0 if mark.without_dropout else None,
        "init": mark.init,
    }
    setattr(config, NAME, entry)


def forget(module: nn.Module) -> None:
    """Take away what `note` said of a module, and the whole entry with the last one."""
    config: Any = getattr(module, "config", None)
    if not isinstance(getattr(config, NAME, None), dict):
        return
    entry = _entry(config)
    entry["marks"].pop(described(module), None)
    if entry["marks"]:
        setattr(config, NAME, entry)
    else:
        delattr(config, NAME)


def _entry(config: Any) -> dict[str, Any]:
    # A new one each time: configs are copied by reference of what they hold.
    said = getattr(config, NAME, None)
    marks = said.get("marks", {}) if isinstance(said, dict) else {}
    return {"load_with": _LOADS, "marks": dict(marks)}
