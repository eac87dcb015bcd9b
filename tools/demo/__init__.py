"""A small Llama trained with and without marked layers: `python -m tools.demo`."""
