"""A cache holds exactly what is counted, and reading on with it gives what a whole pass gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, Attention, Dense, LatentAttention, Layer, llama
from isoflop.arch.families import gpt, t5
from isoflop.arch.spec import (
    Alibi,
    BlockSparse,
    Chunked,
    DynamicScaling,
    Embedding,
    Experts,
    Head,
    LayerNorm,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    QkNorm,
    RelativeBias,
    RelativeProjection,
    RmsNorm,
    Rope,
    Sinusoidal,
    Window,
    Wiring,
    YarnScaling,
)
from isoflop.count import Precision, Workload
from isoflop.count.memory_cache import bytes_kv_cache
from isoflop.infer.cache import Advance, Cache
from isoflop.infer.read import Cached, Encoded, Recomputed, padded
from isoflop.model import Decoder, EncoderDecoder, build
from isoflop.model.attention import KeysValues, contexts
from parity_oracle import V, shake

CPU = torch.device("cpu")
TINY = llama("tiny", d_model=12, n_layers=2, n_heads=3, n_kv_heads=3, d_ff=16, vocab_size=V,
             max_seq_len=64)  # fmt: skip
ROPE = Rope(theta=100.0)
KINDS: dict[str, Attention | LatentAttention] = {
    "multi-head": Attention(3, 3, 4, position=ROPE),
    "grouped": Attention(4, 2, 4, position=ROPE),
    "multi-query": Attention(4, 1, 6, position=Rope(interleaved=True, d_rotary=4)),
    "no position": Attention(3, 1, 4),
    "linear": Attention(2, 1, 8, position=Rope(scaling=LinearScaling(2.0))),
    "llama 3": Attention(2, 1, 8, position=Rope(scaling=Llama3Scaling(4.0, 1.0, 4.0, 16))),
    "yarn": Attention(2, 1, 8, position=Rope(scaling=YarnScaling(4.0, 8))),
    "alibi": Attention(3, 1, 4, position=Alibi(0.5)),
    "alibi, grouped": Attention(6, 2, 4, position=Alibi()),
    "alibi in a window": Attention(3, 3, 4, position=Alibi(), span=Window(5)),
    "relative": Attention(3, 1, 4, position=RelativeProjection()),
    "relative in a window": Attention(3, 3, 4, position=RelativeProjection(), span=Window(5)),
    "buckets": Attention(3, 1, 4, position=RelativeBias(8, 20)),
    "window": Attention(3, 1, 4, position=ROPE, span=Window(5)),
    "window of one": Attention(3, 1, 4, position=ROPE, span=Window(1)),
    "sinks in a window": Attention(4, 2, 4, position=ROPE, span=Window(5), sinks=True),
    "capped": Attention(4, 2, 4, position=ROPE, logit_softcap=2.0, scale=0.7),
    "capped in a window": Attention(4, 2, 4, position=ROPE, logit_softcap=2.0, span=Window(4)),
    "norms": Attention(4, 2, 4, position=ROPE, qk_norm=QkNorm(RmsNorm(), "all_heads")),
    "chunks": Attention(3, 3, 4, position=ROPE, span=Chunked(5)),
    "local blocks": Attention(3, 3, 4, position=ROPE, span=BlockSparse(2, 2)),
    "strided blocks": Attention(3, 3, 4, span=BlockSparse(2, 1, 3)),
    "latent": LatentAttention(3, 8, 4, 2, 6, d_q_latent=5, position=ROPE),
    "latent, yarn": LatentAttention(
        3, 8, 4, 4, 6, position=Rope(scaling=YarnScaling(4.0, 8, mscale=0.9, mscale_all_dim=0.6))
    ),
}
PROMPTS = (13, 3, 8)


def of_layers(*layers: Layer, **changes: object) -> Arch:
    return replace(TINY, layers=layers, **changes)


def of(attention: Attention | LatentAttention) -> Arch:
    layer = Layer(attention, Dense(16), RmsNorm())
    return of_layers(layer, layer)


def lively(arch: Arch) -> Decoder:
    """Weights large enough to show, in double precision: agreement is to 1e-12, not 1e-5."""
    model = build(arch, dtype=torch.float64).eval()
    shake(model)
    assert isinstance(model, Decoder)
    return model


def texts(n: int, stream: torch.Generator, lengths: tuple[int, ...] = PROMPTS) -> list[list[int]]:
    return [torch.randint(V, (length + n,), generator=stream).tolist() for length in lengths]


def whole(model: Decoder, rows: list[list[int]]) -> torch.Tensor:
    """The oracle: each text alone, all of it, no cache."""
    return torch.stack([model(torch.tensor([row]))[0, -1] for row in rows])


def assert_reads_on(model: Decoder, steps: list[int], lengths: tuple[int, ...] = PROMPTS) -> None:
    """Prompts of different lengths, then so many tokens of each text at a time."""
    rows = texts(sum(steps), torch.Generator().manual_seed(1), lengths)
    reader = Cached(model, len(rows), max(lengths) + sum(steps))
    done = list(lengths)
    with torch.inference_mode():
        got = reader.read(padded([r[:n] for r, n in zip(rows, done, strict=True)], CPU), done)
        for step in [0, *steps]:
            if step:
                new = [r[n : n + step] for r, n in zip(rows, done, strict=True)]
                done = [n + step for n in done]
                got = reader.read(padded(new, CPU), [step] * len(rows))
            expected = whole(model, [r[:n] for r, n in zip(rows, done, strict=True)])
            reach = expected.max() - expected.min()
            assert reach > 0.5
            assert (got - expected).abs().max() <= 1e-11 * reach


@pytest.mark.parametrize("kind", KINDS)
def test_reading_on_with_a_cache_gives_the_logits_of_each_text_read_whole(kind: str) -> None:
    assert_reads_on(lively(of(KINDS[kind])), [1] * 13)


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_at_a_time_give_the_same_around_a_ring_too(kind: str) -> None:
    assert_reads_on(lively(of(KINDS[kind])), [3, 1, 4, 2, 7])


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_text_takes_the_same_road(kind: str) -> None:
    assert_reads_on(lively(of(KINDS[kind])), [1] * 12 + [3, 1], lengths=(4,))


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_agrees_to_a_hundred_thousandth_of_the_logits_span(kind: str) -> None:
    model = lively(of(KINDS[kind])).float()
    rows = texts(6, torch.Generator().manual_seed(1))
    reader, lengths = Cached(model, 3, 19), list(PROMPTS)
    with torch.inference_mode():
        reader.read(padded([r[:n] for r, n in zip(rows, lengths, strict=True)], CPU), lengths)
        for i in range(6):
            new = torch.tensor([[r[n + i]] for r, n in zip(rows, lengths, strict=True)])
            got = reader.read(new, [1, 1, 1])
        expected = whole(model, rows)
    assert (got - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("wiring", Wiring)
def test_every_wiring_and_mixed_kinds_of_layers_read_on(wiring: Wiring) -> None:
    names = ("window", "grouped", "latent", "window")
    layers = (
        Layer(KINDS[kind], Dense(16, gated=True), LayerNorm(), wiring, name=kind) for kind in names
    )
    assert_reads_on(lively(of_layers(*layers)), [1] * 6)


def test_experts_read_on() -> None:
    experts = Experts(n_experts=6, n_active=2, expert=Dense(8, gated=True), shared=Dense(8))
    assert_reads_on(lively(of_layers(Layer(KINDS["grouped"], experts, RmsNorm()))), [1] * 6)


@pytest.mark.parametrize(
    "embedding",
    [
        gpt("g", d_model=12, n_layers=1, n_heads=3, vocab_size=V, max_seq_len=64).embedding,
        Embedding(V, position=Sinusoidal(), norm=LayerNorm(), d_embed=7, scale=2.0),
    ],
    ids=["learned", "sinusoidal"],
)
def test_positions_of_the_embedding_are_each_texts_own(embedding: Embedding) -> None:
    layer = Layer(KINDS["no position"], Dense(16), RmsNorm())
    head = Head(softcap=3.0, scale=2.0)
    assert_reads_on(lively(of_layers(layer, embedding=embedding, head=head)), [1] * 6)


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [(DynamicScaling(3.0), 64), (LongRopeScaling((1.0, 2.0), (5.0, 7.0), 10), 10)],
    ids=["dynamic", "longrope"],
)
def test_a_scaling_by_reach_turns_each_text_of_a_batch_by_its_own_reach(
    scaling: DynamicScaling | LongRopeScaling, reach: int
) -> None:
    model = lively(of(Attention(3, 1, 4, position=Rope(scaling=scaling))))
    rows = texts(0, torch.Generator().manual_seed(1), (reach + 9, 3, reach + 2))
    lengths = [len(row) for row in rows]
    with torch.inference_mode():
        expected = whole(model, rows)
        for make in (Cached, Recomputed):
            got = make(model, 3, reach + 9).read(padded(rows, CPU), lengths)
            assert (got - expected).abs().max() <= 1e-11


def test_recomputing_gives_what_a_cache_gives() -> None:
    model = lively(of(KINDS["window"]))
    rows = texts(4, torch.Generator().manual_seed(1))
    readers = [make(model, 3, 17) for make in (Cached, Recomputed)]
    with torch.inference_mode():
        for at in range(-1, 4):
            new = [r[:n] if at < 0 else [r[n + at]] for r, n in zip(rows, PROMPTS, strict=True)]
            a, b = (x.read(padded(new, CPU), [len(row) for row in new]) for x in readers)
            assert (a - b).abs().max() <= 1e-11


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["window", "chunks", "local blocks", "alibi in a window", "grouped"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 6), max_size=6),
    st.randoms(use_true_random=False),
)
def test_any_advance_of_any_batch_gives_the_same(kind, lengths, columns, random) -> None:
    model = RINGS.setdefault(kind, lively(of(KINDS[kind])))
    counts = [[random.randint(1, n) for _ in lengths] for n in columns]
    rows = texts(sum(columns), torch.Generator().manual_seed(2), tuple(lengths))
    reader, done = Cached(model, len(rows), max(lengths) + sum(columns)), list(lengths)
    with torch.inference_mode():
        got = reader.read(padded([r[:n] for r, n in zip(rows, done, strict=True)], CPU), done)
        for count in counts:
            new = [r[n : n + c] for r, n, c in zip(rows, done, count, strict=True)]
            done = [n + c for n, c in zip(done, count, strict=True)]
            got = reader.read(padded(new, CPU), count)
        expected = whole(model, [r[:n] for r, n in zip(rows, done, strict=True)])
    assert (got - expected).abs().max() <= 1e-10


RINGS: dict[str, Decoder] = {}


def test_no_slot_is_written_twice_at_once() -> None:
    """On a GPU nothing says which of two would stay."""
    advance = Advance.of([4, 0, 9], [7, 2, 6], 7, CPU)
    into = advance.places(Window(5), 5).into
    pairs = list(zip(into.rows.tolist(), into.slots.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) == 5 + 2 + 5


# --- latents --------------------------------------------------------------------------------


def test_absorbed_maps_read_what_rebuilt_keys_and_values_read() -> None:
    model = lively(of(KINDS["latent"]))
    module = model.layers[0].attention
    x = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    context = contexts(model.arch, x)["layer"]
    with torch.inference_mode():
        q = module.queries(x, context.rotation)
        latent, k = module.latents(x, context.rotation)
        kept = torch.cat((latent[:, :, None], k), dim=-1)
        triangle = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        absorbed = module.out(module.attend_latents(q, kept, triangle).flatten(-2))
        assert (absorbed - module(x, context)).abs().max() <= 1e-12


# --- an encoder -----------------------------------------------------------------------------


def lively_t5() -> EncoderDecoder:
    arch = t5("t5", d_model=12, n_layers=2, n_heads=3, d_head=4, d_ff=16, vocab_size=V)
    model = build(arch, dtype=torch.float64).eval()
    shake(model)
    assert isinstance(model, EncoderDecoder)
    return model


def test_an_encoder_is_read_once_and_each_source_as_if_alone() -> None:
    model = lively_t5()
    stream = torch.Generator().manual_seed(3)
    sources, targets = texts(0, stream, (9, 4, 6)), texts(0, stream, (11, 11, 11))
    with torch.inference_mode():
        reader = Cached(model, 3, 11, Encoded.of(model, sources))
        for at in range(11):
            got = reader.read(torch.tensor([[row[at]] for row in targets]), [1, 1, 1])
            for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
                expected = model(torch.tensor([source]), torch.tensor([target[: at + 1]]))[0, -1]
                assert (got[i] - expected).abs().max() <= 1e-11


# --- bytes ----------------------------------------------------------------------------------

BATCH = 3


@pytest.mark.parametrize("n_tokens", [1, 4, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_has_the_bytes_that_are_counted(kind: str, n_tokens: int) -> None:
    arch = of(KINDS[kind])
    for precision, dtype in ((Precision.FP32, torch.float32), (Precision.BF16, torch.bfloat16)):
        counted = bytes_kv_cache(arch, Workload.decode(BATCH, n_tokens), precision).value
        assert Cache(arch, BATCH, n_tokens, dtype=dtype).bytes_kv_cache == counted


def test_layers_of_several_kinds_have_the_bytes_that_are_counted() -> None:
    kinds = {k: Layer(KINDS[k], Dense(4), RmsNorm(), name=f"k{i}") for i, k in enumerate(KINDS)}
    arch = of_layers(*(kinds[k] for k in KINDS if k != "buckets"), kinds["window"])
    counted = bytes_kv_cache(arch, Workload.decode(BATCH, 23), Precision.FP32).value
    assert Cache(arch, BATCH, 23).bytes_kv_cache == counted


def test_an_encoders_keys_and_values_have_the_bytes_that_are_counted() -> None:
    model = lively_t5().float()
    work = Workload(batch=2, seq_len=1, context=10, source_len=7)
    reader = Cached(model, 2, 10, Encoded.of(model, [[1] * 7, [2] * 5]))
    counted = bytes_kv_cache(model.arch, work, Precision.FP32).value
    assert reader.bytes_kv_cache == counted


def test_what_is_counted_is_what_lies_in_memory() -> None:
    cache = Cache(of(KINDS["window"]), 2, 40)
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
              for stores in cache.stores for x in stores}  # fmt: skip
    assert sum(stored.values()) == cache.bytes_kv_cache


# --- training knows nothing of it -----------------------------------------------------------


class Taken:
    """A memory that hands on what it is given."""

    def extend(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return new


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_a_first_pass_with_a_cache_has_the_bits_of_one_without(kind: str) -> None:
    model = lively(of(KINDS[kind])).float()
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    context = contexts(model.arch, x)["layer"]
    module = model.layers[0].attention
    assert torch.equal(module(x, context), module(x, replace(context, memory=Taken())))


def test_keys_and_values_given_as_a_source_are_not_kept() -> None:
    class Refuses:
        def extend(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
            raise AssertionError

    module = lively(of(KINDS["no position"])).layers[0].attention
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    context = contexts(of(KINDS["no position"]), x)["layer"]
    made = module.keys_values(x, context)
    assert isinstance(made, KeysValues)
    module(x, replace(context, memory=Refuses()), made)
