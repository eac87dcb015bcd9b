"""What passes ask of a graph."""
