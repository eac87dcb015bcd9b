"""How marking reads each kind of attention module, one file a family."""
