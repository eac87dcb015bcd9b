"""What tests of the plugin share."""

from unittest import mock

import pytest
import torch

from simplex_ops.marking import windows_in_graphs


@pytest.fixture(autouse=True)
def _no_window_changed_yet():
    """Forget the windows of other tests: after a few different ones all become symbols."""
    patch = torch.compiler.config.patch  # pyright: ignore[reportAttributeAccessIssue]
    with mock.patch.object(windows_in_graphs, "_seen", set()), patch(dynamic_sources=""):
        yield
