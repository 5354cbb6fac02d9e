"""What no kernel shows: the time between kernels and PyTorch's own memory.

Both are read off the least models there are, in fresh processes: models so small that
what they take is what any model takes.
"""

from __future__ import annotations

from isoflop.arch import Arch, gpt, llama
from isoflop.check.measure import Task, measure_room, measure_steps
from isoflop.count import Workload
from isoflop.count.blocks import describe
from isoflop.hardware.profile import Profile
from isoflop.plan.cost import n_operators, step_cost
from isoflop.plan.memory.peak import bytes_alive

#: Layers added to a model of one, tokens of a step, and how it is timed.
LAYERS_ADDED, LEAST_TOKENS, STEPS_LEAST, SECONDS_LEAST = 8, 32, 60, 0.8
#: Steps until memory has peaked.
STEPS_MEMORY = 4
#: A model whose tensors are many times the room that a process has at the start.
MIDDLING = gpt("middling", d_model=224, n_layers=3, n_heads=7, vocab_size=1000, max_seq_len=192)


def seconds_between(profile: Profile) -> float:
    """What one operator of a real step costs beside its kernels.

    Layers are added to the least models of both families, so that kernels take next to
    nothing; what they add beyond the curves, over the operators they add.
    """
    found = []
    for layers_of in (_least_gpt, _least_llama):
        few, many = layers_of(1), layers_of(1 + LAYERS_ADDED)
        tasks = [
            Task(arch, 1, LEAST_TOKENS, profile.machine.n_threads, STEPS_LEAST, SECONDS_LEAST)
            for arch in (few, many)
        ]
        measured = [m.seconds_step for m in measure_steps(*tasks)]
        work = Workload.train(1, LEAST_TOKENS)
        priced = [float(step_cost(arch, work, profile).value) for arch in (few, many)]
        operators = [int(n_operators(describe(arch, work)).value) for arch in (few, many)]
        extra = (measured[1] - measured[0]) - (priced[1] - priced[0])
        found.append(max(0.0, extra / (operators[1] - operators[0])))
    return sum(found) / len(found)


def _least_gpt(n_layers: int) -> Arch:
    return gpt("least", d_model=32, n_layers=n_layers, n_heads=2, vocab_size=64,
               max_seq_len=LEAST_TOKENS)  # fmt: skip


def _least_llama(n_layers: int) -> Arch:
    return llama("least", d_model=32, n_layers=n_layers, n_heads=2, n_kv_heads=1, d_ff=64,
                 vocab_size=64, max_seq_len=LEAST_TOKENS)  # fmt: skip


def resident_memory(threads: int, bytes_reused: int) -> tuple[int, int, float]:
    """Bytes that PyTorch itself grows by, room in its heap, resident bytes per live byte.

    The first is all that a model of almost no size needs. The second is what tensors may
    take before the process grows. The last is what a middling model needs for each byte
    that the description says is alive: alignment and fragmentation.
    """
    least = [
        Task(arch, 1, LEAST_TOKENS, threads, STEPS_MEMORY, SECONDS_LEAST)
        for arch in (_least_gpt(1), _least_llama(1))
    ]
    middling = Task(MIDDLING, 6, 192, threads, STEPS_MEMORY, SECONDS_LEAST)
    framework = sum(peak_of(task) for task in least) // len(least)
    room = measure_room(least[0])
    alive = bytes_alive(MIDDLING, Workload.train(6, 192), bytes_reused)
    held = peak_of(middling) - framework - alive.bytes_large + room
    return framework, room, held / alive.bytes_small


def peak_of(task: Task) -> int:
    """A process each: the peak of one model must not stand in another's."""
    (measured,) = measure_steps(task)
    return measured.bytes_peak
