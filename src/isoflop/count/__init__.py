"""What a model costs, as trees over the paths of its parts.

blocks.py describes each kind of block once; params.py, flops.py, memory.py and
traffic.py fold over that description; workload.py says what the model is asked to do.
"""

from isoflop.count.flops import flops_6n, flops_forward, flops_training
from isoflop.count.memory import (
    TRAINING_STATES,
    TrainingState,
    bytes_kv_cache,
    bytes_saved,
    bytes_weights,
    memory_inference,
    memory_training,
)
from isoflop.count.params import CONVENTIONS, Convention, params
from isoflop.count.traffic import Task, tasks
from isoflop.count.workload import Precision, Workload

__all__ = [
    "CONVENTIONS",
    "TRAINING_STATES",
    "Convention",
    "Precision",
    "Task",
    "TrainingState",
    "Workload",
    "bytes_kv_cache",
    "bytes_saved",
    "bytes_weights",
    "flops_6n",
    "flops_forward",
    "flops_training",
    "memory_inference",
    "memory_training",
    "params",
    "tasks",
]
