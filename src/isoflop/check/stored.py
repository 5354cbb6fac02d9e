"""What a built model stores: parameters, buffers, bytes in memory and on disk, caches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from isoflop.arch import Arch
from isoflop.check.paths import tree_path
from isoflop.check.row import Row, leaf_values, rows
from isoflop.count import Precision, Workload, buffers, bytes_kv_cache, bytes_weights, params
from isoflop.errors import InputError
from isoflop.model import Decoder, EncoderDecoder
from isoflop.model.attention import AttentionModule, Context, LatentAttentionModule, contexts
from isoflop.model.attention.context import blocks_seen
from isoflop.model.weights.header import bytes_of_file
from isoflop.model.weights.write import tensors_of_files
from isoflop.train.checkpoint import tensors_of

BATCH = 2


def stored_rows(arch: Arch, module: Decoder | EncoderDecoder) -> Iterator[Row]:
    """Everything that is stored, by path: numbers, and bytes in single precision."""
    weights = sizes_by_path(module.named_parameters(), arch)
    held = sizes_by_path(module.named_buffers(), arch)
    tree = buffers(arch)
    four = {path: 4 * size for path, size in weights.items()}
    yield from rows("params", leaf_values(params(arch)), weights)
    yield from rows("buffers", {} if tree is None else leaf_values(tree), held)
    yield from rows("bytes", leaf_values(bytes_weights(arch, Precision.FP32)), four)
    yield from _disk_rows(arch, module)
    yield from _cache_rows(arch, module)


def sizes_by_path(named: Iterator[tuple[str, Tensor]], arch: Arch) -> dict[str, int]:
    """Numbers by path; a tied tensor appears once, where it is stored."""
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in named:
        sizes[tree_path(name.rpartition(".")[0], arch)] += tensor.numel()
    return dict(sizes)


def _disk_rows(arch: Arch, module: Decoder | EncoderDecoder) -> Iterator[Row]:
    """The files that `save_model` would write, or a checkpoint's where no family has such a model."""
    tree = buffers(arch)
    held = 0 if tree is None else 4 * int(tree.value)
    derived = int(bytes_weights(arch, Precision.FP32).value) + held
    files = files_of(module)
    tensors = [tensor for file in files for tensor in file.values()]
    data, whole = bytes_of(tensors), sum(map(bytes_of_file, files))
    names = f"names, shapes and places of {len(tensors):,} tensors in {len(files):,} files"
    yield Row("disk/tensors", derived, data)
    yield Row("disk/headers", 0, whole - data, names, None)
    yield Row("disk", derived, whole, "headers", None)


def files_of(module: Decoder | EncoderDecoder) -> list[dict[str, Tensor]]:
    """The tensors of each file of weights, as they would be written."""
    try:
        return tensors_of_files(module)
    except InputError:
        return [tensors_of(module)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cache_rows(arch: Arch, module: Decoder | EncoderDecoder) -> Iterator[Row]:
    """Keys and values, or latents, of as many tokens as the model is made for."""
    work = Workload.decode(BATCH, arch.max_seq_len)
    derived = leaf_values(bytes_kv_cache(arch, work, Precision.FP32))
    yield from rows("cache", derived, dict(_cached(arch, module, work)))


def _cached(
    arch: Arch, module: Decoder | EncoderDecoder, work: Workload
) -> Iterator[tuple[str, int]]:
    """Bytes by kind of layer; a layer reads what it would keep, and is asked for it."""
    kinds = {layer.name: i for i, layer in enumerate(arch.layers)}
    for name, i in kinds.items():
        attention, times = module.get_submodule(f"layers.{i}.attention"), arch.times(name)
        n_held = tokens_held(attention, work.context)
        x_BTD = torch.empty(work.batch, n_held, arch.d_model, device="meta")
        kept = _kept_of(attention, x_BTD, contexts(arch, x_BTD)[name])
        yield name, times * bytes_of(kept)
        if isinstance(module, EncoderDecoder):
            memory_BSD = x_BTD.new_empty(work.batch, int(work.source.value), arch.d_model)
            cross = module.get_submodule(f"layers.{i}.cross")
            yield f"{name}_cross", times * bytes_of(_kept_of(cross, memory_BSD, Context()))


def _kept_of(attention: nn.Module, x_BTD: Tensor, context: Context) -> tuple[Tensor, ...]:
    if isinstance(attention, LatentAttentionModule):
        assert context.rotation is not None
        return attention.latents(x_BTD, context.rotation)
    assert isinstance(attention, AttentionModule)
    both = attention.keys_values(x_BTD, context)
    return both.k_BSKH, both.v_BSKH


def tokens_held(attention: nn.Module, n_tokens: int) -> int:
    """How many of the tokens read so far a later one, or the last, may look at; at most so many."""
    if not isinstance(attention, AttentionModule):
        return n_tokens
    if attention.window is not None:
        return min(n_tokens, attention.window)
    blocks = blocks_seen(attention.spec.span, 2 * n_tokens, torch.device("cpu"))
    if blocks is None:
        return n_tokens
    last = -(-n_tokens // blocks.size)
    n_blocks = int(blocks.seen[last - 1 :, :last].any(dim=0).sum())
    return min(n_tokens, n_blocks * blocks.size)
