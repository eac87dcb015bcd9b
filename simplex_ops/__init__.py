"""2-simplicial attention as an ordinary PyTorch operator.

Importing this package registers `torch.ops.simplex.attn`; it needs neither a GPU nor triton.
"""

from simplex_ops import register as _register  # noqa: F401  (registers the operators)

__version__ = "0.1.0"
