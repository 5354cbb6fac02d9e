"""What a model costs, as trees over the paths of its parts.

blocks.py describes each kind of block once; params.py, flops.py, memory.py and
traffic.py fold over that description; workload.py says what the model is asked to do.
"""

from isoflop.count.flops import flops_6n, flops_forward, flops_training
from isoflop.count.memory import memory_inference, memory_training
from isoflop.count.memory_cache import bytes_kv_cache
from isoflop.count.memory_rank import Shards, Trained, memory_rank
from isoflop.count.memory_saved import KERNELS, RECOMPUTES, Kernels, Recompute, bytes_saved
from isoflop.count.memory_state import OPTIMIZERS, TRAINING_STATES, Optimizer, TrainingState
from isoflop.count.memory_weights import FORMATS, Format, bytes_weights
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
