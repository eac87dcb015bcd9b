"""The blocked path: the operator in PyTorch operations, for the CPU and for what no kernel serves.

plan.py     which queries and keys one step takes, and what they see of each other
buffers.py  the copies that turn every window into a strided view
forms.py    virtual queries of each form, and their gradients
forward.py  and backward.py  the two operators
"""
