"""What eager, fake and compiled code agree on: schemas, input checks, memory order, windows."""
