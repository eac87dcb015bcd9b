"""The support table: which models are served, eager and compiled, each cell run when it is made."""
