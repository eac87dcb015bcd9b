"""How marking reads each kind of attention module: the protocol, and one file a family."""
