"""Which pairs of keys each query of a trained model attends to most."""
