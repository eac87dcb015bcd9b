"""What is aimed at: fractions of an anchor's rate, or of our own on another workload."""

from tools.workloads import Direction

YARDSTICK = {"cuda": "cudnn fwd", "cpu": "matmul"}
# The least fraction of the yardstick's rate.
AIMS: dict[tuple[str, Direction], float] = {
    ("llama-mqa", "forward"): 1.0,
    ("gqa8", "forward"): 0.82,
    ("gqa4", "forward"): 0.75,
    ("mha16", "forward"): 0.68,
    ("llama-mqa", "backward"): 0.62,
    ("gqa8-2k", "backward"): 0.48,
    ("gqa4-2k", "backward"): 0.44,
    ("mha16-2k", "backward"): 0.38,
    ("mqa-d64", "forward"): 0.85,
    ("gqa4-d64", "forward"): 0.75,
    ("mqa-d64", "backward"): 0.5,
    ("gqa4-d64", "backward"): 0.45,
    ("cpu", "forward"): 0.40,
    ("cpu", "backward"): 0.25,
}
# The least fraction of our useful rate on another workload, in the same direction: (forward,
# backward). Short sequences see less of their windows, and nominal rates count whole ones.
RELATIVE_AIMS: dict[str, tuple[str, float, float]] = {
    "mqa-1024x32": ("llama-mqa", 0.85, 0.85),
    "mqa-256x64": ("llama-mqa", 0.85, 0.85),
    "mqa-128x128": ("llama-mqa", 0.85, 0.85),
    "mqa-512x16": ("llama-mqa", 0.85, 0.85),
    "mqa-32x512": ("llama-mqa", 0.85, 0.85),
    "mqa-fp16": ("llama-mqa", 0.9, 0.9),
    "gqa4-b1": ("gqa4", 0.6, 0.6),
    "gqa5-odd": ("gqa5", 0.6, 0.6),
    "odd": ("gqa3-d96", 0.6, 0.6),
    "determinant": ("trilinear", 0.7, 0.6),
    "strassen": ("trilinear", 0.85, 0.75),
    "n32k": ("n4k", 0.95, 0.95),
    "n128k": ("n4k", 0.95, 0.95),
}
# Of eager code's rate, through torch.compile.
OF_EAGER = 0.97
