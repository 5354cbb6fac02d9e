"""Our own attention kernels in Triton: forward, and a backward without atomics.

tile.py is what forward.py and backward.py do to every tile alike; launch.py picks tiles and
joins the passes into one differentiable call. Plain pointers only, so that Triton 3.4 to 3.9
take them; nothing here is imported where Triton is not installed.

A kernel is one function, longer than ours are elsewhere: what it keeps in registers cannot
be handed around, and its phases must unroll in one body.
"""
