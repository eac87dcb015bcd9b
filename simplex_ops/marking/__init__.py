"""Marks: how attention modules of an existing model become 2-simplicial."""
