"""Bytes on one accelerator: what a rank holds, at its peak and moment by moment, and what fits."""
