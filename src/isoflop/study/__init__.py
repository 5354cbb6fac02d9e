"""Ladders of small models: planned from predictions, run for real, fitted, and judged.

ladder.py plans the rungs and the held-out target; launch.py runs one in a process of its
own; loop.py goes the whole way and keeps every number.
"""
