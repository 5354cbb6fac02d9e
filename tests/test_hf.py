"""Hugging Face configs: transformers' own classes are the oracle, hostile files are refused."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.strategies import gpts, llamas, palms

from isoflop.arch import Arch, from_hf, gpt, llama, palm, read_hf, to_hf
from isoflop.arch.foreign import parse_json
from isoflop.arch.spec import Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from isoflop.count import params
from isoflop.errors import InputError, UnknownName

#: Raise it for a long run: ISOFLOP_EXAMPLES=10 makes ten times as many.
EXAMPLES = int(os.environ.get("ISOFLOP_EXAMPLES", "1"))
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))

CLASSES = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}

SHAPES: list[dict[str, Any]] = [
    {"model_type": "gpt2"},
    {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 101},
    {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 100, "n_positions": 77},
    {"model_type": "gpt2", "n_embd": 60, "n_layer": 2, "n_head": 5, "tie_word_embeddings": False},
    {"model_type": "llama"},
    {"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
     "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 99},
    {"model_type": "llama", "hidden_size": 96, "intermediate_size": 100, "num_hidden_layers": 3,
     "num_attention_heads": 6, "head_dim": 32, "tie_word_embeddings": True, "vocab_size": 50},
    {"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
     "num_attention_heads": 4, "attention_bias": True, "mlp_bias": True, "head_dim": None},
]  # fmt: skip

TINY = llama(
    "tiny", d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=256, max_seq_len=128
)  # fmt: skip


def oracle_params(config: dict[str, Any]) -> int:
    """The trained numbers of transformers' class, built without memory."""
    config_class, model_class = CLASSES[config["model_type"]]
    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = model_class(config_class(**keys))
    return sum(p.numel() for p in model.parameters())


# --- agreement with transformers --------------------------------------------------------


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_the_count_is_that_of_transformers_class(config: dict[str, Any]) -> None:
    assert params(from_hf(config, "x")).value == oracle_params(config)


@settings(QUIET, max_examples=15 * EXAMPLES)
@given(st.one_of(gpts(), llamas()))
def test_a_written_config_builds_the_same_model(arch: Arch) -> None:
    assert params(arch).value == oracle_params(to_hf(arch))


@settings(QUIET, max_examples=150 * EXAMPLES)
@given(st.one_of(gpts(), llamas()))
def test_a_written_config_reads_back_equal(arch: Arch) -> None:
    config = json.loads(json.dumps(to_hf(arch)))
    assert from_hf(config, arch.name) == arch


def test_a_config_saved_by_transformers_5_reads_as_meant(tmp_path: Any) -> None:
    theirs = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=99, num_hidden_layers=2, num_attention_heads=4,
        rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 1024},
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    reading = read_hf(parse_json((tmp_path / "config.json").read_bytes(), "config.json"), "x")
    position = reading.arch.layers[0].attention.position
    assert position == Rope(5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 1024))
    assert reading.unknown == ()
    assert reading.defaulted == ()


@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_both_spellings_of_rope_scaling_mean_the_same(word: str) -> None:
    table = {word: "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    arch = from_hf({"model_type": "llama", "rope_scaling": table, "rope_theta": 1e6}, "x")
    assert arch.layers[0].attention.position == Rope(1e6, scaling=YarnScaling(4.0, 512))


def test_a_theta_in_the_table_goes_before_the_one_beside_it() -> None:
    keys = {"model_type": "llama", "rope_theta": 1.0, "rope_parameters": {"rope_theta": 7.0}}
    theirs = transformers.LlamaConfig(rope_theta=1.0, rope_parameters={"rope_theta": 7.0})
    position = from_hf(keys, "x").layers[0].attention.position
    assert isinstance(position, Rope)
    assert position.theta == theirs.rope_parameters["rope_theta"] == 7.0


def test_the_written_rope_is_the_one_transformers_understands() -> None:
    scaling = LongRopeScaling((1.0,) * 8, (2.0,) * 8, 64)
    arch = llama("x", d_model=64, n_layers=1, n_heads=4, d_ff=9, vocab_size=9, max_seq_len=128,
                 theta=123.0, scaling=scaling)  # fmt: skip
    keys = to_hf(arch)
    theirs = transformers.LlamaConfig(**keys).rope_parameters
    assert theirs["rope_theta"] == 123.0
    assert theirs["rope_type"] == "longrope"
    assert theirs["long_factor"] == [2.0] * 8
    assert theirs["original_max_position_embeddings"] == 64


# --- what is absent, unknown, or not sayable --------------------------------------------


def test_absent_keys_take_the_defaults_of_the_class_and_say_so() -> None:
    reading = read_hf({"model_type": "gpt2"}, "x")
    theirs = transformers.GPT2Config()
    assert reading.arch.d_model == theirs.n_embd
    assert reading.arch.head.tied is theirs.tie_word_embeddings is True
    assert f"n_embd={theirs.n_embd}" in reading.defaulted
    assert from_hf({"model_type": "llama"}, "x").head.tied is False


def test_keys_are_sorted_into_ignored_and_unknown() -> None:
    keys = {"use_cache": True, "torch_dtype": "float16", "moe_layers": 4, "pruned_heads": {}}
    reading = read_hf({"model_type": "gpt2", **keys}, "x")
    assert reading.ignored == ("torch_dtype", "use_cache")
    assert reading.unknown == ("moe_layers",)


def test_another_head_and_an_inner_key_are_reported() -> None:
    keys = {"architectures": ["LlamaForSequenceClassification"],
            "rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}  # fmt: skip
    reading = read_hf({"model_type": "llama", **keys}, "x")
    assert reading.unknown == ("architectures", "rope_scaling.odd")


def test_second_names_of_gpt2_are_read() -> None:
    assert (
        from_hf({"model_type": "gpt2", "hidden_size": 96, "num_hidden_layers": 1}, "x").d_model
        == 96
    )
    with pytest.raises(InputError, match="n_embd"):
        from_hf({"model_type": "gpt2", "hidden_size": 96, "n_embd": 72}, "x")


def test_an_unknown_model_type_lists_near_names() -> None:
    with pytest.raises(UnknownName, match="did you mean llama"):
        from_hf({"model_type": "llamma"}, "x")


@given(palms())
def test_what_a_family_cannot_say_is_named(arch: Arch) -> None:
    with pytest.raises(InputError, match=r"layers\[0\]\.") as caught:
        to_hf(arch)
    assert "config can say here" in str(caught.value)


def test_a_padded_vocabulary_cannot_be_said() -> None:
    arch = gpt("x", d_model=8, n_layers=1, n_heads=2, vocab_size=9, n_rows=16, max_seq_len=4)
    with pytest.raises(InputError, match="n_rows"):
        to_hf(arch)


def test_a_shape_that_one_class_refuses_is_written_for_another() -> None:
    arch = llama(
        "x", d_model=60, n_layers=1, n_heads=8, d_head=16, d_ff=9, vocab_size=9, max_seq_len=4
    )
    keys = to_hf(arch)
    assert keys.pop("model_type") == "mistral"  # LlamaConfig asks for 60 % 8 == 0
    with torch.device("meta"):
        theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**keys))
    assert params(arch).value == sum(p.numel() for p in theirs.parameters())
    with pytest.raises(Exception, match="hidden size"):  # huggingface_hub's own kind
        transformers.LlamaConfig(**keys)
    with pytest.raises(InputError):
        to_hf(
            palm(
                "x", d_model=8, n_layers=1, n_heads=1, d_head=8, d_ff=8, vocab_size=9, max_seq_len=4
            )
        )


def test_a_broken_rule_names_the_key_of_the_config() -> None:
    with pytest.raises(InputError) as caught:
        from_hf({"model_type": "llama", "num_key_value_heads": 3}, "x")
    assert [p.field for p in caught.value.problems] == ["num_key_value_heads"]


def test_all_wrong_types_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        from_hf(
            {"model_type": "llama", "hidden_size": "4096", "mlp_bias": 1, "hidden_act": "x"}, "x"
        )
    assert {p.field for p in caught.value.problems} == {"hidden_size", "mlp_bias", "hidden_act"}


# --- malformed configs ------------------------------------------------------------------

NOT_A_SIZE = st.one_of(
    st.integers(max_value=0),
    st.integers(min_value=10**12 + 1, max_value=10**4000),
    st.floats(),
    st.booleans(),
    st.text(max_size=9),
    st.lists(st.integers(), max_size=3),
    st.just({}),
)
NOT_A_NUMBER = st.one_of(
    st.sampled_from([float("nan"), float("inf"), float("-inf"), 10**4000, -1, True, None]),
    st.floats(min_value=1e31),
    st.text(max_size=9),
    st.lists(st.floats(), max_size=2),
)
NOT_A_FLAG = st.one_of(st.integers(), st.none(), st.text(max_size=5), st.floats())
NOT_A_TABLE = st.one_of(st.integers(), st.text(max_size=5), st.lists(st.integers(), min_size=1))

#: Each key with the values it may not have; null says "not set" where the class allows it.
WRONG: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "gpt2": {
        **dict.fromkeys(["n_embd", "n_layer", "n_head", "vocab_size", "n_positions"],
                        st.one_of(NOT_A_SIZE, st.none())),
        "n_inner": NOT_A_SIZE,
        **dict.fromkeys(["layer_norm_epsilon", "resid_pdrop", "attn_pdrop", "embd_pdrop"], NOT_A_NUMBER),
        "tie_word_embeddings": NOT_A_FLAG,
        "activation_function": st.one_of(st.none(), st.integers(), st.just("geluu")),
        "scale_attn_by_inverse_layer_idx": st.just(True),
    },
    "llama": {
        **dict.fromkeys(["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                         "intermediate_size", "max_position_embeddings"],
                        st.one_of(NOT_A_SIZE, st.none())),
        **dict.fromkeys(["num_key_value_heads", "head_dim"], NOT_A_SIZE),
        "rms_norm_eps": NOT_A_NUMBER,
        "rope_theta": NOT_A_NUMBER.filter(lambda value: value is not None),
        "rope_scaling": NOT_A_TABLE,
        "attention_bias": NOT_A_FLAG,
        "mlp_bias": NOT_A_FLAG,
    },
}  # fmt: skip


@st.composite
def malformed(draw: st.DrawFn) -> dict[str, Any]:
    """A legal config with one to three keys made wrong."""
    family = draw(st.sampled_from(["gpt2", "llama"]))
    config = to_hf(draw(gpts() if family == "gpt2" else llamas()))
    keys = draw(
        st.lists(st.sampled_from(sorted(WRONG[family])), min_size=1, max_size=3, unique=True)
    )
    return config | {key: draw(WRONG[family][key]) for key in keys}


@settings(QUIET, max_examples=400 * EXAMPLES)
@given(malformed())
def test_a_malformed_config_ends_in_an_input_error(config: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        from_hf(config, "x")
    assert len(str(caught.value)) < 4000


@settings(QUIET, max_examples=200 * EXAMPLES)
@given(
    st.dictionaries(
        st.sampled_from([*WRONG["gpt2"], *WRONG["llama"], "rope_parameters", "architectures"]),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(st.sampled_from(["type", "factor", "rope_theta"]), inner),
            ),
        ),
    ),
    st.sampled_from(["gpt2", "llama", "lama", "", None, 3, [], {}]),
)
def test_any_values_give_a_spec_or_an_input_error(keys: dict[str, Any], model_type: Any) -> None:
    with contextlib.suppress(InputError):
        from_hf({**keys, "model_type": model_type}, "x")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_attention_heads": 6}, "num_attention_heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 8}, "num_key_value_heads"),
        ({"num_attention_heads": 4, "head_dim": 15}, "head_dim"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "nearest", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.short_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"hidden_size": 10**5000, "num_attention_heads": 3}, "hidden_size"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "-".join(value),
)
def test_a_constraint_names_its_key(changes: dict[str, Any], field: str) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "vocab_size": 99} | changes
    with pytest.raises(InputError) as caught:
        from_hf(config, "x")
    assert field in [p.field for p in caught.value.problems]


# --- the guarded reading of JSON --------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b'{"a": 1' + b"0" * 5000 + b"}", "number of at most"),
        (b'{"a": 1e400}', "finite"),
        (b'{"a": NaN}', "is JSON"),
        (b'{"a": -Infinity}', "is JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "given once"),
        (b'{"a": 1, "\\u0061": 3}', "given once"),
        (b'\xef\xbb\xbf{"a": 1}', "starts with its text"),
        (b'{"a": "\\ud800"}', "pairs its surrogates"),
        (b'{"a": "\xff"}', "is UTF-8"),
        (b"[1, 2]", "an object"),
        (b"3", "an object"),
        (b"", "is JSON"),
        (b'{"a": 01}', "is JSON"),
        (b'{"a": 1-1}', "is a number"),
        (b'{"a": 1', "is JSON"),
        (b'{"a": "x', "is JSON"),
        (b'{"a": "\\x"}', "is a JSON string"),
        (b'{"a": [' + b"0," * 100_000, "among at most 100,000"),
        (b"}" * 10, "closes what was opened"),
        (b'{"a": ' + b"[" * 100_000, "nests at most 32"),
        (b'{"a": ' * 100_000, "nests at most 32"),
        (b"{" + b",".join(b'"%d": 1' % n for n in range(2001)) + b"}", "at most 2,000 keys"),
        (b'{"a": "' + b"x" * 65_000 + b'"}', "at most 64,000 characters"),
        (b" " * ((1 << 20) + 1), "at most 1,048,576 bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_hostile_json_is_refused_with_its_rule(data: bytes, rule: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(data, "config.json")
    assert rule in caught.value.problems[0].rule


def test_a_refusal_says_line_and_column() -> None:
    with pytest.raises(InputError) as caught:
        parse_json(b'{\n  "a": 1,\n  "a": 2\n}', "config.json")
    assert caught.value.problems[0].field == "line 3, column 6"


@settings(QUIET, max_examples=200 * EXAMPLES)
@given(st.data())
def test_a_damaged_config_is_refused_or_read(data: st.DataObject) -> None:
    text = json.dumps(to_hf(TINY)).encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 30, len(text))))
    junk = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"NaN", b"1e999", b"{", b"]"]))
    )
    with contextlib.suppress(InputError):
        from_hf(parse_json(text[:start] + junk + text[end:], "config.json"), "x")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30),
              st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=20,
)  # fmt: skip


@settings(QUIET, max_examples=60 * EXAMPLES)
@given(st.dictionaries(st.text(), json_values), st.booleans(), st.sampled_from([None, 2]))
def test_ordinary_json_reads_as_python_reads_it(
    value: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert parse_json(text.encode(), "x.json") == value
