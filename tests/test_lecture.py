"""The lecture's calculator: exact at a family's sizes, close between them, right about the lecture."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import isoflop
from isoflop import calculate_llm_memory
from isoflop.arch import zoo
from isoflop.arch.zoo import entry
from isoflop.count import Precision, Workload, memory_inference
from isoflop.count.lecture import between, members_of
from isoflop.errors import InputError, UnknownName

GIB = 2**30
WORK = Workload.train(1, 2048)


def test_gpt3_is_right_where_the_lecture_was_not() -> None:
    # The exact model: 174,604,259,328 weights; the cache 4.72 MB a token; no 10 % for activations.
    right = calculate_llm_memory(175e9)
    assert right["weights"] == pytest.approx(325.2, abs=0.05)
    assert right["kv_cache"] == pytest.approx(9.0, abs=0.01)
    assert right["activations"] < 1.5
    assert right["total"] == sum(right[part] for part in ("weights", "kv_cache", "activations"))
    # The lecture's own arithmetic, reconstructed: 325.96, 9.00, 32.60, 367.56.
    assert 0.9 * 367.56 < right["total"] < 367.56


@pytest.mark.parametrize(
    ("name", "size", "like", "kv_gb"),
    [("llama-2-7b", 7e9, "llama-2", 1.074), ("llama-3-70b", 70e9, "llama-3", 0.671),
     ("llama-3.1-405b", 405e9, "llama-3", 1.057), ("palm-540b", 540e9, "palm", 0.247)],
)  # fmt: skip
def test_a_published_size_is_that_very_model(
    name: str, size: float, like: str, kv_gb: float
) -> None:
    tree = memory_inference(entry(name).arch, WORK, Precision.FP16)
    found = calculate_llm_memory(size, like=like)
    assert found["total"] * GIB == pytest.approx(float(tree.value), rel=1e-12)
    assert found["kv_cache"] * GIB / 1e9 == pytest.approx(kv_gb, abs=6e-4)


#: Left out, these are not met to 10 % in the cache by what the others say, and why.
IRREGULAR = {
    "gpt2": "the smallest: half again as wide for its depth as the next",
    "gpt3-small": "the smallest: half again as wide for its depth as the next",
    "gpt3-medium": "as deep as the sizes three times larger",
    "gpt3-large": "its larger neighbour has heads that multiply to 1.5 times its width",
    "gpt3-xl": "24 heads of 128 on a width of 2048: half again the cache of its width",
    "gpt3-2.7b": "its smaller neighbour is that one",
    "llama-3.2-1b": "heads of 64 where all others have 128",
    "llama-3.2-3b": "its smaller neighbour has heads of 64",
    "llama-3.1-8b": "as few key-value heads at 32 layers as the 3B at 28: the cache hardly grows",
    "llama-3.3-70b": "the number of key-value heads is 8 at every size, so only depth counts",
    "llama-3.1-405b": "the number of key-value heads is 8 at every size, so only depth counts",
}


def left_out(like: str) -> dict[str, tuple[float, float]]:
    """Error of the cache and of the total when a size is predicted from the family's others."""
    members, errors = members_of(like), {}
    for i, member in enumerate(members):
        true = member.parts("fp16", WORK)
        told = between(members[:i] + members[i + 1 :], member.n_params, "fp16", WORK)
        errors[member.arch.name] = (
            abs(told["kv_cache"] / true["kv_cache"] - 1),
            abs(sum(told.values()) / sum(true.values()) - 1),
        )
    return errors


@pytest.mark.parametrize("like", ["gpt2", "gpt3", "llama-3"])
def test_a_size_left_out_is_met_from_the_others_or_known_to_be_irregular(like: str) -> None:
    errors = left_out(like)
    assert len(errors) >= 4
    assert {name for name, (cache, _) in errors.items() if cache > 0.1} == {
        n for n in errors if n in IRREGULAR
    }
    assert max(total for _, total in errors.values()) <= 0.05


@pytest.mark.parametrize(
    ("like", "size", "power"),
    [("gpt3", 175e9, 2 / 3), ("llama-3", 405e9, 1 / 3), ("palm", 540e9, 1 / 3), ("llama-2", 70e9, 2 / 3)],
)  # fmt: skip
def test_beyond_a_family_the_shape_of_its_largest_is_kept(
    like: str, size: float, power: float
) -> None:
    # Eight times the size: twice as deep and wide; as many key-value heads, or twice as many.
    largest, beyond = (calculate_llm_memory(n, like=like) for n in (size, 8 * size))
    grown = beyond["kv_cache"] / largest["kv_cache"]
    assert grown == pytest.approx(8**power, rel=0.03)  # the layers grow a little more than all


@given(st.floats(1e8, 2e12), st.sampled_from(["gpt2", "gpt3", "llama-2", "llama-3", "palm"]),
       st.integers(1, 64), st.integers(1, 10**5), st.sampled_from(["fp32", "fp16", "int8", "int4"]))  # fmt: skip
@example(1e8, "palm", 1, 1, "fp32")
@settings(max_examples=60, deadline=None)
def test_more_tokens_or_sequences_never_shrink_any_part(
    size: float, like: str, batch: int, tokens: int, precision: str
) -> None:
    base = calculate_llm_memory(size, precision, batch, tokens, like)
    longer = calculate_llm_memory(size, precision, batch, tokens + 1, like)
    more = calculate_llm_memory(size, precision, batch + 1, tokens, like)
    for part, value in base.items():
        assert math.isfinite(value)
        assert value > 0
        assert longer[part] >= value
        assert more[part] >= value
    assert base["total"] == sum(value for part, value in base.items() if part != "total")


def test_fewer_bits_take_less() -> None:
    totals = [calculate_llm_memory(20e9, p)["total"] for p in ("fp32", "fp16", "int8", "int4")]
    assert totals == sorted(totals, reverse=True)
    weights = [calculate_llm_memory(20e9, p)["weights"] for p in ("fp16", "int8", "int4")]
    assert 1.9 < weights[0] / weights[1] <= 2
    assert 3.5 < weights[0] / weights[2] <= 4


def test_bad_input_is_refused_with_every_problem() -> None:
    with pytest.raises(InputError) as caught:
        calculate_llm_memory(0, batch_size=0, seq_len=-1)
    assert {p.field for p in caught.value.problems} == {"num_params", "batch_size", "seq_len"}
    with pytest.raises(UnknownName, match="did you mean gpt3"):
        calculate_llm_memory(1e9, like="gtp3")
    with pytest.raises(UnknownName, match="did you mean fp32 or fp16"):
        calculate_llm_memory(1e9, "fp12")


def test_any_family_of_the_zoo_gives_numbers_or_says_why_not() -> None:
    for like in sorted({name.split("-")[0] for name in zoo.names()}):
        try:
            found = calculate_llm_memory(5e9, like=like)
        except InputError as refusal:
            assert "no second one" in str(refusal)  # noqa: PT017 - either way is fine
        else:
            assert all(math.isfinite(gib) and gib > 0 for gib in found.values())


def test_it_is_a_public_name() -> None:
    assert "calculate_llm_memory" in isoflop.__all__
