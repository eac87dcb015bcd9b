"""The bench of a whole model: `python -m tools.bench.model`."""
