"""Run directories: each is its own truth, and survives kill -9, a full disk and a second process.

run.py holds the `Run` (manifest, status, who may write); metrics.py the log of steps;
lock.py the one writer; durable.py how bytes reach the disk; text.py the JSON.
"""

from isoflop.runs.durable import WriteFailed, sync_folder, write_whole
from isoflop.runs.metrics import read_metrics
from isoflop.runs.run import Manifest, Record, Run, Status

__all__ = [
    "Manifest",
    "Record",
    "Run",
    "Status",
    "WriteFailed",
    "read_metrics",
    "sync_folder",
    "write_whole",
]
