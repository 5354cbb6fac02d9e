"""What a model costs, as trees over the paths of its parts.

blocks.py describes each kind of block once; params.py, flops.py, memory.py and
traffic.py fold over that description; workload.py says what the model is asked to do.
"""

from isoflop.count.finetune import Adapters, Full, Lora, Only, finetune_memory, params_trained
from isoflop.count.flops import (
    FLOPS_CONVENTIONS,
    FlopsConvention,
    flops_6n,
    flops_backward,
    flops_decode,
    flops_forward,
    flops_prefill,
    flops_training,
)
from isoflop.count.lecture import calculate_llm_memory
from isoflop.count.memory import (
    BYTES_RUNTIME,
    memory_inference,
    memory_training,
)
from isoflop.count.memory_cache import bytes_kv_cache
from isoflop.count.memory_rank import Trained, memory_rank
from isoflop.count.memory_saved import KERNELS, RECOMPUTES, Kernels, Recompute, bytes_saved
from isoflop.count.memory_split import Shards
from isoflop.count.memory_stack import STACKS, MemoryStack, overhead, stack_of
from isoflop.count.memory_state import OPTIMIZERS, TRAINING_STATES, Optimizer, TrainingState
from isoflop.count.memory_weights import FORMATS, Format, bytes_weights
from isoflop.count.params import CONVENTIONS, Convention, buffers, params
from isoflop.count.traffic import Task, tasks
from isoflop.count.workload import Precision, Workload

__all__ = [
    "BYTES_RUNTIME",
    "CONVENTIONS",
    "FLOPS_CONVENTIONS",
    "FORMATS",
    "KERNELS",
    "OPTIMIZERS",
    "RECOMPUTES",
    "STACKS",
    "TRAINING_STATES",
    "Adapters",
    "Convention",
    "FlopsConvention",
    "Format",
    "Full",
    "Kernels",
    "Lora",
    "MemoryStack",
    "Only",
    "Optimizer",
    "Precision",
    "Recompute",
    "Shards",
    "Task",
    "Trained",
    "TrainingState",
    "Workload",
    "buffers",
    "bytes_kv_cache",
    "bytes_saved",
    "bytes_weights",
    "calculate_llm_memory",
    "finetune_memory",
    "flops_6n",
    "flops_backward",
    "flops_decode",
    "flops_forward",
    "flops_prefill",
    "flops_training",
    "memory_inference",
    "memory_rank",
    "memory_training",
    "overhead",
    "params",
    "params_trained",
    "stack_of",
    "tasks",
]
