"""Bytes, samples and the baseline: pure functions, checked against slow and plain ones."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.errors import InputError
from isoflop.train.data import Batches, ByteCorpus, validation_batches
from isoflop.train.markov import Markov


def as_text(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


# --- corpus -----------------------------------------------------------------------------


def test_documents_never_cross_the_split():
    documents = [bytes([65 + i % 26]) * 5 + str(i).encode() for i in range(60)]
    corpus = ByteCorpus.from_documents("x", documents)
    train = bytes(corpus.train.tolist()).split(b"\0")[:-1]
    validation = bytes(corpus.validation.tolist()).split(b"\0")[:-1]
    assert validation == [documents[9], documents[29], documents[49]]
    assert sorted(train + validation) == sorted(documents)
    assert corpus.split == "every 20th of 60 documents"


def test_few_documents_give_their_last_twentieth():
    corpus = ByteCorpus.from_documents("x", [b"a" * 99, b"b" * 99])
    assert (len(corpus.train), len(corpus.validation)) == (190, 10)
    assert bytes(corpus.validation.tolist()) == b"b" * 9 + b"\0"


def test_the_python_library_is_bounded_and_the_same_each_time():
    small = ByteCorpus.python_library(300_000)
    total = len(small.train) + len(small.validation)
    assert 300_000 <= total < 800_000
    assert small.fingerprint == ByteCorpus.python_library(300_000).fingerprint
    assert small.summary()["sha256"] == small.fingerprint


def test_the_fingerprint_sees_one_byte_and_the_place_of_the_split():
    base = ByteCorpus("x", as_text(b"abcd"), as_text(b"ef"), 1, "")
    one = ByteCorpus("x", as_text(b"abce"), as_text(b"ef"), 1, "")
    moved = ByteCorpus("x", as_text(b"abc"), as_text(b"def"), 1, "")
    assert len({c.fingerprint for c in (base, one, moved)}) == 3


def test_a_folder_is_read_in_order_of_path_and_any_bytes_are_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes(b"\xff\xfe" * 10)
    (tmp_path / "a.txt").write_bytes(b"A" * 20)
    (tmp_path / ".hidden").write_bytes(b"H")
    corpus = ByteCorpus.from_path(tmp_path)
    joined = bytes(torch.cat([corpus.train, corpus.validation]).tolist())
    assert joined == b"A" * 20 + b"\0" + b"\xff\xfe" * 10 + b"\0"


def test_missing_empty_and_unreadable_data_are_named(tmp_path):
    with pytest.raises(InputError, match="be a file or a folder"):
        ByteCorpus.from_path(tmp_path / "nowhere")
    with pytest.raises(InputError, match="at least one byte"):
        ByteCorpus.from_path(tmp_path)
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(InputError) as caught:
        ByteCorpus.from_path(tmp_path)
    assert [str(p.value).rpartition("/")[2] for p in caught.value.problems] == ["x.txt", "y.txt"]


# --- batches ----------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**40))


@given(sizes, st.integers(0, 1000), st.data())
def test_a_batch_depends_on_seed_step_and_slot_alone(size, step, data):
    seq_len, batch_size, seed = size
    text = torch.arange(200, dtype=torch.uint8)
    tokens_BT, targets_BT = Batches(text, seq_len, batch_size, seed)(step)
    again = Batches(text, seq_len, batch_size, seed)
    again(data.draw(st.integers(0, 1000)))  # another batch first makes no difference
    worker = data.draw(st.integers(1, batch_size))
    shares = [again(step, range(rank, batch_size, worker)) for rank in range(worker)]
    for rank, (tokens, targets) in enumerate(shares):
        assert torch.equal(tokens, tokens_BT[rank::worker])
        assert torch.equal(targets, targets_BT[rank::worker])
    assert torch.equal(tokens_BT[:, 1:], targets_BT[:, :-1])
    assert torch.equal(targets_BT, tokens_BT + 1)


@given(sizes, st.integers(0, 3))
def test_an_epoch_predicts_each_byte_at_most_once_and_takes_every_window(size, epoch):
    seq_len, _, seed = size
    batches = Batches(torch.zeros(200, dtype=torch.uint8), seq_len, 1, seed)
    n = batches.n_windows
    starts = [batches.starts(step)[0] for step in range(epoch * n, (epoch + 1) * n)]
    assert len({start // seq_len for start in starts}) == n
    assert len({(start - starts[0]) % seq_len for start in starts}) == 1
    assert all(start >= 0 and start + seq_len + 1 <= 200 for start in starts)
    assert n * seq_len > 200 - 2 * seq_len


def test_other_seeds_and_epochs_have_other_orders():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = Batches(torch.zeros(1000, dtype=torch.uint8), 10, 1, seed)
        n = batches.n_windows
        return tuple(batches.starts(epoch * n + i)[0] // 10 for i in range(n))

    assert len({order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_text_too_short_for_the_context_is_an_input_error():
    Batches(torch.zeros(16, dtype=torch.uint8), 8, 1, 0)
    with pytest.raises(InputError, match="at least 16 bytes for seq_len=8"):
        Batches(torch.zeros(15, dtype=torch.uint8), 8, 1, 0)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 99))
def test_validation_batches_cover_the_bytes_asked_for_once(seq_len, batch_size, eval_bytes):
    corpus = ByteCorpus("x", as_text(b"x"), torch.arange(100, dtype=torch.uint8), 1, "")
    if not seq_len <= eval_bytes < 99 // seq_len * seq_len + seq_len:
        with pytest.raises(InputError, match="eval_bytes"):
            validation_batches(
                corpus, eval_bytes=eval_bytes, seq_len=seq_len, batch_size=batch_size
            )
        return
    batches = validation_batches(
        corpus, eval_bytes=eval_bytes, seq_len=seq_len, batch_size=batch_size
    )
    predicted = torch.cat([targets.flatten() for _, targets in batches]).tolist()
    assert len(predicted) == eval_bytes // seq_len * seq_len
    assert predicted == sorted(set(predicted))
    assert all(torch.equal(targets, tokens + 1) for tokens, targets in batches)
    assert all(len(tokens) <= batch_size for tokens, _ in batches)


# --- the baseline -----------------------------------------------------------------------


def plain_nats_per_byte(train: bytes, text: bytes, order: int) -> float:
    """Witten-Bell by dictionaries, one byte at a time."""
    followers: dict[bytes, Counter[int]] = defaultdict(Counter)
    for k in range(order + 1):
        for i in range(k, len(train)):
            followers[bytes([k]) + train[i - k : i]][train[i]] += 1

    def p(context: bytes, byte: int) -> float:
        below = p(context[1:], byte) if context else 1 / 256
        seen = followers.get(bytes([len(context)]) + context)
        if seen is None:
            return below
        return (seen[byte] + len(seen) * below) / (seen.total() + len(seen))

    return -sum(
        math.log(p(text[max(i - order, 0) : i], byte)) for i, byte in enumerate(text)
    ) / len(text)


texts = st.binary(min_size=4, max_size=60) | st.text("ab\0", min_size=4, max_size=60).map(
    str.encode
)


@settings(max_examples=60)
@given(texts, st.binary(min_size=1, max_size=30) | texts, st.integers(0, 3))
def test_markov_equals_the_dictionary_model(train, text, order):
    fitted = Markov.fit(as_text(train), order).nats_per_byte(as_text(text))
    assert math.isclose(fitted, plain_nats_per_byte(train, text, order), rel_tol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_markov_gives_every_next_byte_a_share_of_exactly_one(order):
    draw = random.Random(order)
    model = Markov.fit(as_text(bytes(draw.choices(b"abcd", k=300))), order)
    context = b"abc"
    before = model.nats_per_byte(as_text(context)) * 3
    shares = [
        math.exp(before - 4 * model.nats_per_byte(as_text(context + bytes([b]))))
        for b in range(256)
    ]
    assert math.isclose(sum(shares), 1, rel_tol=1e-12)


def test_markov_finds_the_order_of_its_source():
    draw = random.Random(5)
    text = bytearray(b"ab")
    for _ in range(6000):  # the next byte is almost always decided by the two before
        certain = b"abc"[(text[-1] + 2 * text[-2]) % 3]
        text.append(certain if draw.random() < 0.9 else draw.choice(b"abc"))
    train, held_out = as_text(bytes(text[:5000])), as_text(bytes(text[5000:]))
    nats = [Markov.fit(train, order).nats_per_byte(held_out) for order in range(4)]
    assert nats[2] == min(nats)
    assert nats[2] < 0.75 * nats[1]


def test_markov_refuses_what_it_cannot_count():
    for order in (-1, 4, True, 1.0):
        with pytest.raises(InputError, match="order"):
            Markov.fit(as_text(b"abc"), order)
    with pytest.raises(InputError, match="more than 3 bytes"):
        Markov.fit(as_text(b"abc"), 3)
    with pytest.raises(InputError, match="at least one byte"):
        Markov.fit(as_text(b"abc"), 1).nats_per_byte(as_text(b"abc")[:0])
