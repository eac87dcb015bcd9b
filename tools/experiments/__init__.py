"""Experiments: what 2-simplicial attention does that ordinary attention does not, and its cost."""
