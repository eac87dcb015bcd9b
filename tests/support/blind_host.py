"""A host that decides nothing by values, as on a device where looking would synchronise."""

import sys

import pytest

from simplex_ops.devices.blocked import host


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the blocked path look at no tensor, whichever of its modules asks."""
    can_look = host.can_look
    for name, module in list(sys.modules.items()):  # whoever imported it has it by its name
        if name.startswith("simplex_ops.") and getattr(module, "can_look", None) is can_look:
            monkeypatch.setattr(module, "can_look", lambda _: False)
