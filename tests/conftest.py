"""What pytest leaves aside on this machine."""

from importlib.util import find_spec

# It imports Triton's kernels; test_attention_triton.py runs it where Triton is there.
collect_ignore = [] if find_spec("triton") else ["interpreted_attention.py"]
