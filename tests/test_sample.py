"""Sampling: each rule against transformers' own, and what must hold of every draw."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isoflop.errors import InputError
from isoflop.infer.sample import (
    GREEDY,
    Sampling,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize,
    uniforms,
)


def logits_of(n_rows: int = 4, n: int = 50, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n_rows, n, generator=torch.Generator().manual_seed(seed))


some_logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12).map(
    lambda row: torch.tensor([row], dtype=torch.float64)
)
shares = st.floats(0, 1, exclude_min=True)
draws = st.floats(0, 1, exclude_max=True)


# --- the ends of what may be asked ------------------------------------------------------------


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e30])
@pytest.mark.parametrize("penalty", [5e-324, 1.0, 1e30])
def test_the_ends_of_every_number_draw_a_token_there_is(temperature, penalty):
    logits, written = logits_of(), torch.zeros(4, 50, dtype=torch.bool)
    written[:, ::7] = True
    how = Sampling(temperature, repetition_penalty=penalty)
    tokens = choose(logits, how, torch.full((4,), 0.999), written)
    assert ((tokens >= 0) & (tokens < 50)).all()
    if temperature < 1 and penalty == 1:
        assert torch.equal(tokens, logits.argmax(-1))


# --- transformers as the oracle -------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers", reason="transformers is the oracle")
    from transformers.generation import logits_process

    return logits_process


@pytest.mark.parametrize("k", [1, 3, 50, 1000])
def test_top_k_keeps_what_transformers_keeps(theirs, k):
    logits = logits_of()
    assert torch.equal(keep_top_k(logits, k), theirs.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.2, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(theirs, p):
    logits = logits_of()
    assert torch.equal(keep_top_p(logits, p), theirs.TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(theirs, p):
    logits = logits_of()
    assert torch.equal(keep_min_p(logits, p), theirs.MinPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(theirs, penalty):
    logits, tokens = (
        logits_of(),
        torch.tensor([[3, 3, 7, 0], [1, 2, 3, 4], [9, 9, 9, 9], [5, 1, 5, 6]]),
    )
    written = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, value=True)
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits)
    assert torch.equal(penalize(logits, written, penalty), expected)


def test_all_rules_together_leave_the_distribution_of_transformers(theirs):
    logits, tokens = logits_of(n_rows=2), torch.tensor([[3, 8, 7], [1, 2, 40]])
    written = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, value=True)
    rules = [
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
        theirs.TemperatureLogitsWarper(0.7),
        theirs.TopKLogitsWarper(20),
        theirs.TopPLogitsWarper(0.9),
        theirs.MinPLogitsWarper(0.02),
    ]
    expected = logits.double()
    for rule in rules:
        expected = rule(tokens, expected)
    sampling = Sampling(0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.4)
    n = 20_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # every draw there is, evenly
    for row in range(2):
        both = (x[row : row + 1].expand(n, -1) for x in (logits, written))
        rows, seen = both
        counts = choose(rows, sampling, grid, seen).bincount(minlength=50) / n
        assert torch.allclose(counts.double(), expected[row].softmax(-1), rtol=0, atol=1.01 / n)


# --- what holds of every draw ---------------------------------------------------------------


@given(some_logits, shares)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits, p):
    probabilities = sorted(logits[0].softmax(-1).tolist(), reverse=True)
    kept = int(keep_top_p(logits, p).isfinite().sum())
    assert kept >= 1
    assert math.fsum(probabilities[:kept]) >= p - 1e-9
    assert kept == 1 or math.fsum(probabilities[: kept - 1]) < p + 1e-9


@given(some_logits, st.integers(1, 15), shares)
def test_no_rule_rules_out_the_likeliest(logits, k, p):
    best = logits.argmax(-1)
    for kept in (keep_top_k(logits, k), keep_top_p(logits, p), keep_min_p(logits, p)):
        assert torch.equal(kept.amax(-1), logits.gather(1, best[:, None])[:, 0])


@given(some_logits, draws, st.integers(1, 12), shares, shares)
def test_a_draw_is_a_token_that_no_rule_ruled_out(logits, u, k, top_p, min_p):
    sampling = Sampling(1.3, top_k=k, top_p=top_p, min_p=min_p)
    token = choose(logits, sampling, torch.tensor([u], dtype=torch.float64))
    scaled = logits / 1.3
    left = keep_min_p(keep_top_p(keep_top_k(scaled, k), top_p), min_p)
    assert left[0, token].isfinite()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.integers(0, 999))
def test_a_draw_falls_where_the_shares_say(weights, thousandths):
    shares_V = torch.tensor([weights], dtype=torch.float64)
    u = (thousandths + 0.5) / 1000
    token = int(draw(shares_V.log(), torch.tensor([u], dtype=torch.float64)))
    below, total = sum(weights[:token]), sum(weights)
    assert weights[token] > 0
    assert below / total - 1e-12 <= u <= (below + weights[token]) / total + 1e-12


def test_the_largest_draw_there_is_takes_the_last_token_that_can_be_taken():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    largest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(logits, largest).item() == 1
    assert draw(logits, torch.zeros(1)).item() == 0


def test_temperature_0_is_the_likeliest_whatever_is_drawn():
    logits = logits_of()
    for u in (0.0, 0.5, 0.999):
        assert torch.equal(choose(logits, GREEDY, torch.full((4,), u)), logits.argmax(-1))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.integers(1, 40))
def test_a_rows_draws_depend_on_its_seed_and_place_alone(seeds, n):
    together = uniforms(seeds, n)
    for row, seed in enumerate(seeds):
        assert torch.equal(uniforms([seed], n + 17)[:n, 0], together[:, row])


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -1.0),
     ("repetition_penalty", 0.0), ("temperature", float("nan"))],
)  # fmt: skip
def test_a_number_that_its_rule_cannot_have_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})
