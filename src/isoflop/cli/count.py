"""isoflop count · isoflop explain"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from isoflop.arch import Arch
from isoflop.cli.options import Count, Json, Stored, load_model
from isoflop.cli.output import emit, say
from isoflop.count import (
    CONVENTIONS,
    FLOPS_CONVENTIONS,
    TRAINING_STATES,
    Lora,
    Precision,
    Workload,
    bytes_kv_cache,
    bytes_weights,
    finetune_memory,
    flops_6n,
    flops_forward,
    flops_training,
    memory_inference,
    memory_training,
    params,
    params_trained,
)
from isoflop.errors import InputError, Problem, UnknownName
from isoflop.quantity import Node
from isoflop.quantity.node import plain
from isoflop.quantity.units import format_exact, format_value
from isoflop.report.text import describe_bases, table, tree

#: How FLOPs are counted here, printed beside every count.
FLOPS_CONVENTION = (
    "matrix products only, 2 per multiply-accumulate; every query-key pair counted, "
    "none skipped for causality; backward = 2 x forward; nothing recomputed"
)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Low-rank fine-tuning as asked for: the updates, and how the base is stored."""

    method: Lora
    base: str | None

    def to_json(self, arch: Arch) -> dict[str, Any]:
        trained = params_trained(arch, self.method)
        return {
            "rank": self.method.rank,
            "targets": list(self.method.targets),
            "base": self.base,
            "params_trained": plain(trained.value),
            "share_trained": float(trained.value) / float(params(arch).value),
            "tree": trained.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Counted:
    """Everything `isoflop count` derives for one model and workload."""

    arch: Arch
    workload: Workload
    precision: Precision
    params: Node
    flops: Node
    memory: Node
    tuning: Tuning | None = None

    def to_json(self) -> dict[str, Any]:
        named = {c.name: plain(c.count(self.params).value) for c in CONVENTIONS.values()}
        parts = {child.name: plain(child.value) for child in self.memory.children}
        tuning = {} if self.tuning is None else {"finetune": self.tuning.to_json(self.arch)}
        return {
            "model": self.arch.name,
            "workload": {
                "batch": self.workload.batch,
                "seq_len": self.workload.seq_len,
                "precision": self.precision.value,
            },
            "params": {
                "total": plain(self.params.value),
                "active": plain(params(self.arch, active=True).value),
                "embedding": plain(self.params.find("embedding").value),
                "conventions": named,
                "tree": self.params.to_json(),
            },
            "memory": {
                "bytes_kv_cache": 0,
                **parts,
                "bytes_total": plain(self.memory.value),
                "tree": self.memory.to_json(),
            },
            "flops": {
                "forward": plain(self.flops.value),
                "training": plain(flops_training(self.arch, self.workload).value),
                "training_6n": plain(flops_6n(self.arch, self.workload.tokens).value),
                "convention": FLOPS_CONVENTION,
                "conventions": {
                    c.name: plain(c.count(self.arch, self.workload).value)
                    for c in FLOPS_CONVENTIONS.values()
                },
                "tree": self.flops.to_json(),
            },
            **tuning,
        }


def count(
    model: str,
    /,
    *,
    seq_len: Count | None = None,
    batch: Count = 1,
    precision: Stored = Precision.BF16,
    training: Annotated[bool, Parameter(negative="")] = False,
    lora: Count | None = None,
    lora_targets: str | None = None,
    qlora: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
) -> None:
    """Count a model's parameters, FLOPs and memory, as trees.

    Parameters
    ----------
    model
        A zoo name, a config.json or its folder, a TOML spec, or hf:ORG/NAME.
    seq_len
        Tokens per sequence; the model's longest context when not given.
    batch
        Sequences at once.
    precision
        How weights are stored.
    training
        Memory of a training step (weights, gradients, Adam, activations) instead of
        inference.
    lora
        Rank of low-rank updates: memory of fine-tuning them, and how many parameters train.
    lora_targets
        Matrices that get an update, by path or its end: q,v or attention/q,feed_forward/up; q,v when
        not given.
    qlora
        Store the base in nf4 with double quantization; needs --lora.
    """
    arch = load_model(model)
    tuning = read_tuning(lora, lora_targets, qlora=qlora)
    counted = count_all(arch, seq_len or arch.max_seq_len, batch, precision, training=training,
                        tuning=tuning)  # fmt: skip
    if as_json:
        return emit("count", counted.to_json())
    return say(render(counted))


def read_tuning(rank: int | None, targets: str | None, *, qlora: bool) -> Tuning | None:
    """Fine-tuning as the options say it.

    Raises:
        InputError: a quantised base, or targets, without updates to train.
    """
    if rank is None:
        stated = {"--lora-targets": targets, "--qlora": qlora or None}
        bad = [
            Problem(name, value, "goes with --lora RANK", "add --lora 16")
            for name, value in stated.items()
            if value is not None
        ]
        if bad:
            raise InputError("count", bad)
        return None
    said = "q,v" if targets is None else targets
    names = tuple(name.strip() for name in said.split(",") if name.strip())
    return Tuning(Lora(rank, names), "nf4-dq" if qlora else None)


def count_all(
    arch: Arch,
    seq_len: int,
    batch: int,
    precision: Precision,
    *,
    training: bool,
    tuning: Tuning | None = None,
) -> Counted:
    """Derive everything for one workload.

    Raises:
        InputError: a context longer than the model has positions for, or a precision
            that training cannot store weights in.
    """
    workload = workload_of(arch, seq_len, batch)
    memory = _memory(arch, workload, precision, training=training, tuning=tuning)
    return Counted(
        arch, workload, precision, params(arch), flops_forward(arch, workload), memory, tuning
    )


def workload_of(arch: Arch, seq_len: int, batch: int) -> Workload:
    """Whole sequences that the model has positions for.

    Raises:
        InputError: they are longer than the model's longest context.
    """
    if seq_len > arch.max_seq_len:
        rule = f"is at most {arch.name}'s longest context, {arch.max_seq_len}"
        raise InputError("command line", [Problem("--seq-len", seq_len, rule)])
    return Workload.train(batch, seq_len)


def _memory(
    arch: Arch, workload: Workload, precision: Precision, *, training: bool, tuning: Tuning | None
) -> Node:
    if not training and tuning is None:
        return memory_inference(arch, workload, precision)
    if precision.value not in TRAINING_STATES:
        usable = [name for name in TRAINING_STATES if name in list(Precision)]
        raise UnknownName("training precision", precision.value, usable,
                          f"choose one of {', '.join(usable)}")  # fmt: skip
    state = TRAINING_STATES[precision.value]
    if tuning is None:
        return memory_training(arch, workload, state)
    return finetune_memory(arch, workload, tuning.method, state, base=tuning.base)


def render(counted: Counted) -> str:
    """The counts as text: three trees and what they rest on."""
    work = counted.workload
    active = params(counted.arch, active=True).value
    training = flops_training(counted.arch, work).value
    title = f"{counted.arch.name}: {format_exact(counted.params.value)} parameters"
    if active != counted.params.value:
        title += f", {format_exact(active)} active per token"
    if counted.tuning is not None:
        trained = params_trained(counted.arch, counted.tuning.method).value
        title += f", {format_exact(trained)} trained"
    return "\n".join(
        [
            title,
            "",
            tree(counted.params, exact=True, formulas=True),
            "",
            f"memory, batch {work.batch} x {format_exact(work.seq_len)} tokens, {counted.precision.value}",
            tree(counted.memory, depth=1),
            "",
            f"FLOPs of one forward pass over those tokens ({format_value(training, 'flops')} to train on them)",
            tree(counted.flops, depth=2),
            f"counted: {FLOPS_CONVENTION}",
        ]
    )


# --- explain ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Explained:
    """One number of one tree, and its place in the whole."""

    quantity: str
    path: str
    node: Node
    root: Node

    def to_json(self) -> dict[str, Any]:
        copies = self.root.copies(self.path)
        value = self.node.value * copies
        return {
            "quantity": self.quantity,
            "path": self.path,
            "unit": self.node.unit,
            "value": plain(value),
            "formula": self.node.total.text,
            "numbers": self.node.total.digits,
            "copies": plain(copies),
            "share": float(value) / float(self.root.value) if self.root.value else 0.0,
            "basis": sorted(b.value for b in self.node.bases),
            "source": self.node.source,
            "letters": {s.name: s.meaning for s in self.node.total.symbols().values() if s.meaning},
        }


def explain(
    model: str,
    path: str,
    /,
    *,
    seq_len: Count | None = None,
    batch: Count = 1,
    precision: Stored = Precision.BF16,
    as_json: Json = False,
) -> None:
    """Explain one number: formula, numbers, result, share, source.

    Parameters
    ----------
    model
        A zoo name, a config.json or its folder, a TOML spec, or hf:ORG/NAME.
    path
        A part such as layer/attention/k, in every tree that has it; or of one tree:
        params/..., flops/..., memory/...
    seq_len
        Tokens per sequence; the model's longest context when not given.
    batch
        Sequences at once.
    precision
        How weights are stored.
    """
    arch = load_model(model)
    workload = workload_of(arch, seq_len or arch.max_seq_len, batch)
    found = list(find_everywhere(arch, workload, precision, path))
    data = [f.to_json() for f in found]
    if as_json:
        return emit("explain", {"model": arch.name, "path": path, "quantities": data})
    return say("\n\n".join(map(_tell, found)))


def find_everywhere(
    arch: Arch, workload: Workload, precision: Precision, path: str
) -> Iterator[Explained]:
    """The node at `path` in each tree that has it.

    Raises:
        UnknownName: no tree has it; the message says what is there.
    """
    trees = {
        "params": params(arch),
        "flops": flops_forward(arch, workload),
        "memory": memory_inference(arch, workload, precision),
        "bytes_weights": bytes_weights(arch, precision),
        "bytes_kv_cache": bytes_kv_cache(arch, workload, precision),
    }
    first, _, rest = path.partition("/")
    if first in trees:
        yield Explained(first, rest, trees[first].find(rest), trees[first])
        return
    found = [name for name, root in trees.items() if path in dict(root.walk())]
    if not found:
        raise _no_such_path(path, trees)
    yield from (Explained(name, path, trees[name].find(path), trees[name]) for name in found)


def _no_such_path(path: str, trees: Mapping[str, Node]) -> UnknownName:
    """What there is instead: whole paths that end in what was asked for, or near ones."""
    known = dict.fromkeys(p for root in trees.values() for p, _ in root.walk() if p)
    ends = [p for p in known if p.endswith(f"/{path}")]
    top = ", ".join(p for p in known if "/" not in p)
    hint = f"write {' or '.join(ends[:3])}" if ends else f"it starts with {top}"
    return UnknownName("path", path, () if ends else known, hint)


def _tell(found: Explained) -> str:
    data = found.to_json()
    value = format_exact(found.node.value)
    rows = [
        ["  formula", data["formula"]],
        ["  numbers", f"{data['numbers']} = {value}"],
    ]
    if data["copies"] != 1:
        rows.append(
            ["  copies", f"x{format_exact(data['copies'])} = {format_exact(data['value'])}"]
        )
    rows.append(["  share", f"{100 * data['share']:.2f} % of {format_exact(found.root.value)}"])
    rows.append(["  truth", describe_bases(found.node.bases)])
    if found.node.source:
        rows.append(["  source", found.node.source])
    rows += [[f"  {name}", meaning] for name, meaning in data["letters"].items()]
    where = f"{found.quantity}/{found.path}".rstrip("/")
    return f"{where}: {format_value(data['value'], found.node.unit)}\n{table(rows)}"
