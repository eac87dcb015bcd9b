"""2-simplicial attention as an ordinary PyTorch operator.

Importing this package registers `torch.ops.simplex.attn`; it needs neither a GPU nor triton.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from simplex_ops import register as _register  # noqa: F401  (registers the operators)
from simplex_ops.attended import AttendedPairs, attended_pairs
from simplex_ops.bounds import (
    kv_bounds_from_cu_seqlens,
    kv_bounds_from_document_ids,
    kv_bounds_from_padding_mask,
)
from simplex_ops.compiling import disable, enable, last_report
from simplex_ops.devices.gpu import SlowPathWarning
from simplex_ops.functional import simplicial_attention
from simplex_ops.marking.call import UnservedMarkError
from simplex_ops.marking.families.known import register_family
from simplex_ops.marking.mark import mark, unmark
from simplex_ops.marking.models import mark_model, marked_modules, simplicial_parameters
from simplex_ops.module import SimplicialAttention

if _TYPE_CHECKING:
    from simplex_ops.marking.explaining import explain
    from simplex_ops.marking.loading import from_pretrained, mark_like

__all__ = [
    "AttendedPairs",
    "SimplicialAttention",
    "SlowPathWarning",
    "UnservedMarkError",
    "attended_pairs",
    "disable",
    "enable",
    "explain",
    "from_pretrained",
    "kv_bounds_from_cu_seqlens",
    "kv_bounds_from_document_ids",
    "kv_bounds_from_padding_mask",
    "last_report",
    "mark",
    "mark_like",
    "mark_model",
    "marked_modules",
    "register_family",
    "simplicial_attention",
    "simplicial_parameters",
    "unmark",
]

__version__ = "0.1.0"

_LOADED_WHEN_ASKED_FOR = {
    "explain": "simplex_ops.marking.explaining",
    "from_pretrained": "simplex_ops.marking.loading",
    "mark_like": "simplex_ops.marking.loading",
}


def __getattr__(name: str) -> _Any:
    if name not in _LOADED_WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(_LOADED_WHEN_ASKED_FOR[name]), name)
