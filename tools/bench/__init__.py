"""How fast the operator is, beside anchors and peers: `python -m tools.bench`."""
