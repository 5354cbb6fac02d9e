"""Shapes for about N parameters: near N, near what is published, and even where it matters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Attention, load
from isoflop.count import params
from isoflop.count.shape import LARGEST, SMALLEST, shape
from isoflop.errors import InputError, UnknownName
from isoflop.plan.layout import tensor_rules

#: log10 of sizes, with a vocabulary that such a model could have.
EXPONENTS = st.floats(6.0, 12.3)


def vocabulary(n_params: float) -> int:
    return 1024 if n_params < 3e7 else 32_000


@settings(max_examples=60, deadline=None)
@given(EXPONENTS, st.sampled_from(["llama", "gpt"]))
def test_the_count_is_within_five_percent_of_what_was_asked(exponent: float, family: str) -> None:
    wanted = min(10**exponent, LARGEST)
    model = shape(wanted, family=family, vocab_size=vocabulary(wanted), max_seq_len=2048)
    assert int(params(model).value) == pytest.approx(wanted, rel=0.05)
    assert model.max_seq_len == 2048
    assert model.vocab_size == vocabulary(wanted)


@settings(max_examples=20, deadline=None)
@given(st.floats(9.5, 12.3))
def test_large_shapes_split_evenly_over_eight_accelerators(exponent: float) -> None:
    model = shape(min(10**exponent, LARGEST))
    assert all(not tensor_rules(tp, model) for tp in (1, 2, 4, 8))
    assert model.n_layers % 2 == 0
    attention = model.layers[0].attention
    assert isinstance(attention, Attention)
    assert (attention.d_head, attention.n_kv_heads) == (128, 8)


@pytest.mark.parametrize(
    "name", ["llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"]
)  # fmt: skip
def test_the_shape_of_a_published_size_is_near_the_published_shape(name: str) -> None:
    published = load(name).arch
    count = float(params(published).value)
    ours = shape(count, vocab_size=published.vocab_size, max_seq_len=4096)
    assert ours.d_model == pytest.approx(published.d_model, rel=0.15)
    assert ours.n_layers == pytest.approx(published.n_layers, rel=0.15)


@settings(max_examples=20, deadline=None)
@given(EXPONENTS)
def test_width_over_depth_stays_where_shape_matters_little(exponent: float) -> None:
    model = shape(min(10**exponent, LARGEST), vocab_size=vocabulary(10**exponent))
    # Kaplan 2020, figure 5: a few percent of loss from about 10 to about 500.
    assert 10 < model.d_model / model.n_layers < 500


def test_small_models_tie_their_head_and_large_ones_do_not() -> None:
    assert shape(1e9).head.tied
    assert not shape(8e9).head.tied


@pytest.mark.parametrize("n_params", [SMALLEST / 2, 3 * LARGEST, float("nan")])
def test_a_size_out_of_range_is_refused(n_params: float) -> None:
    with pytest.raises(InputError, match="n_params"):
        shape(n_params)


def test_an_embedding_larger_than_the_model_is_refused_with_what_would_help() -> None:
    with pytest.raises(InputError, match="another vocabulary"):
        shape(2e6, vocab_size=128_256)


def test_a_family_without_rules_is_named() -> None:
    with pytest.raises(UnknownName, match="llama"):
        shape(1e9, family="lama")
