"""The whole model as parts."""

from __future__ import annotations

from dataclasses import replace

from isoflop.arch.spec import Arch
from isoflop.count.blocks.ends import embedding_part, head_part, loss_part
from isoflop.count.blocks.layer import Source
from isoflop.count.blocks.norms import norm_part
from isoflop.count.blocks.part import Ground, Part, Scope, dropped
from isoflop.count.blocks.towers import encoder_part, pairs_ahead, stack_parts, vision_part
from isoflop.count.workload import Workload


def describe(arch: Arch, workload: Workload, scope: Scope | None = None) -> Part:
    """The whole model as parts, in the order in which they run; `scope` learns their names.

    An encoder and a vision tower run where whole sequences are read; where tokens are
    decoded against a cache they have run before.
    """
    scope = Scope() if scope is None else scope
    D = scope("d_model", arch.d_model, "width of the residual stream")
    ground = Ground.of(scope, workload, D)
    vocabulary = scope("vocab_size", arch.vocab_size, "tokens that can be read and written")
    rows = vocabulary
    if arch.embedding.n_rows != arch.vocab_size:
        rows = scope("n_rows", arch.embedding.n_rows, "rows of the embedding, padding included")
    source = Source(workload.source, cached=not workload.whole) if arch.encoder else None
    # The decoder is described first, so that the plain names of sizes are its own.
    parts = [embedding_part(ground, arch, rows)]
    stack = list(stack_parts(_with_images(ground, arch, workload), arch.layers, source))
    if arch.vision is not None:
        parts.append(vision_part(ground, arch.vision, workload.images_read))
    if arch.encoder is not None and source is not None:
        parts.append(encoder_part(ground, arch.encoder, source, arch.embedding.dropout, rows))
    parts += stack
    if arch.final_norm is not None:
        parts.append(norm_part(ground, "final_norm", arch.final_norm))
    if arch.encoder is not None and arch.embedding.dropout:
        masks = dropped(arch.embedding.dropout, ground.tokens * D)
        parts.append(Part("output", kept_by_some=masks))
    parts += [head_part(ground, arch, rows), loss_part(ground, vocabulary)]
    return Part(arch.name, parts=tuple(parts))


def _with_images(ground: Ground, arch: Arch, workload: Workload) -> Ground:
    """Where tokens of an image see each other, they do so in every layer of the decoder."""
    if arch.vision is None:
        return ground
    return replace(ground, ahead=pairs_ahead(ground.scope, arch.vision, workload.images_read))


def names_of(arch: Arch, workload: Workload) -> Scope:
    """The names that the description uses, so that a formula beside it means the same by them."""
    scope = Scope()
    describe(arch, workload, scope)
    return scope
