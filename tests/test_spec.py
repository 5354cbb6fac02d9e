"""The spec file: what is written reads back equal, and what is wrong is said, all of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.strategies import archs

from isoflop.arch import Arch, gpt, llama, parse_spec, read_spec, write_spec, zoo
from isoflop.arch.spec import Alibi, LatentAttention, LongRopeScaling, Rope, Window, YarnScaling
from isoflop.arch.toml import layers_from, pattern_of
from isoflop.errors import InputError

#: Raise it for a long run: ISOFLOP_EXAMPLES=20 makes twenty times as many.
EXAMPLES = int(os.environ.get("ISOFLOP_EXAMPLES", "1"))

TINY = llama(
    "tiny", d_model=64, n_layers=6, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=256, max_seq_len=128
)  # fmt: skip


def read(text: str) -> Arch:
    return parse_spec(text.encode(), "spec.toml")


def problems(text: str) -> dict[str, str]:
    with pytest.raises(InputError) as caught:
        read(text)
    return {p.field: f"{p.rule} {p.hint}" for p in caught.value.problems}


@settings(max_examples=150 * EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(archs())
def test_any_spec_reads_back_equal(arch: Arch) -> None:
    assert read(write_spec(arch)) == arch


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_model_reads_back_equal(name: str) -> None:
    arch = zoo.entry(name).arch
    assert read(write_spec(arch)) == arch


def test_a_short_file_means_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        """
        name = "tiny"
        d_model = 64
        n_layers = 5
        vocab_size = 256
        max_seq_len = 128
        final_norm = { kind = "rms_norm" }
        pattern = ["local*2", "global"]
        [layers.local]
        norm = { kind = "rms_norm" }
        attention = { kind = "attention", n_heads = 4, n_kv_heads = 2, d_head = 16, span = { kind = "window", window = 32 } }
        feed_forward = { kind = "dense", d_ff = 96 }
        [layers.global]
        norm = { kind = "rms_norm" }
        attention = { kind = "attention", n_heads = 4, n_kv_heads = 2, d_head = 16 }
        feed_forward = { kind = "dense", d_ff = 96 }
        """
    )
    arch = read_spec(tmp_path / "tiny.toml")
    assert [layer.name for layer in arch.layers] == ["local", "local", "global", "local", "local"]
    assert arch.layers[0].attention.span == Window(32)
    assert arch.embedding.n_rows == 256
    assert not arch.head.tied


def test_a_usual_spec_writes_no_defaults() -> None:
    text = write_spec(TINY)
    assert "[embedding]" not in text
    assert "dropout" not in text
    assert "pattern" not in text


def test_all_problems_are_told_at_once_with_their_places() -> None:
    text = write_spec(TINY)
    for right, wrong in {
        "n_kv_heads = 2": "n_kv_heads = 3",
        "d_ff = 96": "dff = 96",
        'activation = "silu"': 'activation = "swish"',
        "vocab_size = 256": 'vocab_size = "256"',
    }.items():
        assert right in text
        text = text.replace(right, wrong)
    told = problems(text)
    assert set(told) == {
        "vocab_size",
        "layer.attention.n_kv_heads",
        "layer.feed_forward.d_ff",
        "layer.feed_forward.dff",
        "layer.feed_forward.activation",
    }
    assert "did you mean d_ff?" in told["layer.feed_forward.dff"]
    assert "choose one of 1, 2, 4" in told["layer.attention.n_kv_heads"]


@pytest.mark.parametrize(
    ("right", "wrong", "field"),
    [
        ("d_model = 64", "d_model = true", "d_model"),
        ("d_model = 64", "d_model = 64.0", "d_model"),
        ("d_model = 64", "d_model = -64", "d_model"),
        ("d_model = 64", "d_model = 1979-05-27", "d_model"),
        ("d_model = 64", f"d_model = 1{'0' * 400}", "d_model"),
        ("theta", "thetta", "layer.attention.position.thetta"),
        ("eps = 1e-05", "eps = nan", "layer.norm.eps"),
        ("eps = 1e-05", "eps = 1e999", "layer.norm.eps"),
        ("n_layers = 6", "n_layers = 10001", "n_layers"),
        ("n_layers = 6", "n_layers = 0", "n_layers"),
        ("n_layers = 6", f"n_layers = 1{'0' * 400}", "n_layers"),
        ("n_layers = 6", 'n_layers = 6\npattern = ["layer"]', "layer"),
        ('kind = "attention"', 'kind = "attentoin"', "layer.attention.kind"),
        ('kind = "attention"\n', "", "layer.attention.kind"),
        ('final_norm = { kind = "rms_norm", eps = 1e-05 }', "", "final_norm"),
        ("[layer]\n", "[layer]\nname = 'x'\n", "layer.name"),
    ],
)
def test_one_wrong_value_is_told_at_its_place(right: str, wrong: str, field: str) -> None:
    text = write_spec(replace(TINY, layers=tuple(_with_theta(layer) for layer in TINY.layers)))
    assert right in text
    assert field in problems(text.replace(right, wrong))


def _with_theta(layer):
    position = replace(layer.attention.position, theta=5e5)
    return replace(layer, attention=replace(layer.attention, position=position))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe",
        b"\xef\xbb\xbfname = 1",
        b"name = ",
        b"[a]\n[a]",
        b"x = 1" + b"0" * 5000,
        b"x = " + b"[" * 10_000,
        b"x = " + b"[\n" * 100_000,
        b".".join([b"a"] * 4000) + b" = 1",
        b".".join([b'"a b"'] * 4000) + b" = 1",
        b"x = { " + b" . ".join([b"'a'"] * 4000) + b" = 1 }",
        b"[" + b".".join([b"a"] * 4000) + b"]",
        b"#" * (1 << 21),
        b"\n".join(b"k%d = 1" % n for n in range(3000)),
        b"",
    ],
)
def test_a_hostile_file_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        parse_spec(data, "spec.toml")


@settings(max_examples=150 * EXAMPLES, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    """Never anything but an InputError or a spec, whatever bytes are cut or put in."""
    text = write_spec(TINY).encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + 20, len(text))))
    junk = data.draw(
        st.one_of(st.binary(max_size=8), st.sampled_from([b"nan", b"[[", b'"', b"1e9"]))
    )
    with contextlib.suppress(InputError):
        parse_spec(text[:start] + junk + text[end:], "spec.toml")


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_a_pattern_repeats_to_the_layers_it_was_made_of(names: list[str]) -> None:
    layer = TINY.layers[0]
    kinds = dict.fromkeys(names, layer)
    made = layers_from(len(names), None, kinds, pattern_of(names))
    assert [layer.name for layer in made] == names


@pytest.mark.parametrize(
    "pattern", [[], ["b"], ["a*0"], ["a", "b*2"], ["a*-1"], ["*"], ["a*99999999"]]
)
def test_a_pattern_names_its_kinds(pattern: list[str]) -> None:
    with pytest.raises(InputError):
        layers_from(4, None, {"a": TINY.layers[0]}, pattern)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Alibi(scale=0.0), "scale"),
        (lambda: Rope(1.0, scaling=YarnScaling(2.0, 64)), "theta"),
        (lambda: LongRopeScaling((1.0,), (1.0,), 1), "original_max_seq_len"),
        (lambda: LatentAttention(1, 8, 4, 8, 4, position=Rope(d_rotary=4)), "position.d_rotary"),
    ],
    ids=["alibi", "yarn", "longrope", "latent"],
)
def test_positions_that_cannot_be_computed_are_refused(make, field: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert [problem.field for problem in caught.value.problems] == [field]


def test_a_kind_that_no_layer_uses_is_refused() -> None:
    kinds = dict.fromkeys(["a", "b"], TINY.layers[0])
    with pytest.raises(InputError, match=r"layers\.b"):
        layers_from(4, None, kinds, ["a"])


def test_pydantic_loads_with_the_first_read_only() -> None:
    code = "import sys, isoflop.arch; print('pydantic' in sys.modules, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_names_that_toml_would_misread_survive() -> None:
    arch = gpt(
        'a "quoted" \\ name 😀', d_model=8, n_layers=1, n_heads=2, vocab_size=9, max_seq_len=4
    )
    assert read(write_spec(arch)).name == arch.name
