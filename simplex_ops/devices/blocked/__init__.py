"""The blocked path: the operator in PyTorch operations, for the CPU and for what no kernel serves.

sides.py    which rows of each pair a query sees
plan.py     how a call is cut into tiles; tiles.py  what a tile is, and its strided views
buffers.py  the copies in which every window is a strided view
masks.py    hiding what a query does not see
exponentials.py  exp of a whole tile, without the arguments that are slow
forms.py    virtual queries of each form, and their gradients
host.py     what may be decided by looking at values, on the CPU alone
forward.py  and backward.py  the two operators
"""
