"""Whatever is read from outside: a spec that counts, or every problem with its place and rule.

Configs of every type, spec files and recipes are made wrong, as values and as text. Never a
traceback, a hang (each example has its share of processor time) or memory without bound
(the process may not grow by more than a gibibyte while this module runs).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.test_hf_types import CASES

from isoflop.arch import from_hf, parse_spec, write_spec, zoo
from isoflop.arch.foreign import MAX_DEPTH, parse_json
from isoflop.arch.hf import FAMILIES, read_hf
from isoflop.arch.spec import Arch
from isoflop.arch.toml import spec_from_table
from isoflop.cli.app import run
from isoflop.count import Workload, flops_forward, params
from isoflop.errors import InputError
from isoflop.train.recipe import Recipe, parse_recipe, read_recipe

#: Examples of each kind; ISOFLOP_MALFORMED=10000 for the long run (make fuzz).
MALFORMED = int(os.environ.get("ISOFLOP_MALFORMED", "300"))
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=MALFORMED)
#: Processor time that reading one input may take; a hundredth is usual.
SECONDS_MOST = 20.0
LONGEST_REPORT = 12_000


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """At most a gibibyte more of address space than there is now."""
    if not Path("/proc/self/statm").exists():
        yield
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """A hang ends as an error; the clock counts this process's own time alone."""

    def late(_signal: int, _frame: object) -> NoReturn:
        raise TimeoutError(f"more than {SECONDS_MOST} seconds")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_MOST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_report(error: InputError) -> None:
    """Every problem has a place and a rule, and all of them fit on a screen or two."""
    assert error.problems
    assert all(problem.field and problem.rule for problem in error.problems)
    text = str(error)
    assert len(text) < LONGEST_REPORT
    assert all(line.isprintable() for line in text.splitlines())


def check_counts(arch: Arch) -> None:
    """What was let through is a model: it has parameters, and a forward pass."""
    assert int(params(arch).value) > 0
    assert int(flops_forward(arch, Workload(1, 1, 1)).value) > 0


# --- values ---------------------------------------------------------------------------------

#: By exponent: Python does not print integers past its digit limit, and hypothesis must.
VAST = st.sampled_from([31, 400, 5000, -5000]).map(lambda n: 10**n if n > 0 else -(10**-n))
HUGE = st.one_of(st.sampled_from([10**12 + 1, 2**63, 1e31, 1e308, -1e308]), VAST)
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf")])


def nested(depth: int) -> Any:
    value: Any = []
    for i in range(depth):
        value = [value] if i % 2 else {"type": value}
    return value


NESTED = st.sampled_from([MAX_DEPTH, 400]).map(nested)
TEXTS = st.one_of(
    st.text(max_size=9), st.sampled_from(["", "none", "\x1b[2J", "x" * 10_000, "\ud800"])
)
NOT_A_SIZE = st.one_of(
    st.integers(max_value=0), st.integers(min_value=10**12 + 1, max_value=10**400), st.floats(), HUGE,
    st.booleans(), TEXTS, st.lists(st.integers(), max_size=3), st.just({}), NESTED,
)  # fmt: skip
NOT_A_NUMBER = st.one_of(
    NOT_FINITE, VAST, st.just(True), st.floats(min_value=1e31), TEXTS,
    st.lists(st.floats(), max_size=2), NESTED,
)  # fmt: skip
NOT_A_FLAG = st.one_of(st.integers(), st.none(), st.text(max_size=5), st.floats(), HUGE, NESTED)
#: What each kind of key of a config refuses.
WRONG = {
    "size": st.one_of(NOT_A_SIZE, st.none()),
    "layers": st.one_of(NOT_A_SIZE, st.none(), st.integers(10_001, 10**9)),
    "count": st.one_of(NOT_A_SIZE.filter(lambda x: x != 0 or x is False), st.none()),
    "size_or_none": NOT_A_SIZE,
    "real": st.one_of(NOT_A_NUMBER, st.none()),
    "real_or_none": NOT_A_NUMBER,
    "flag": NOT_A_FLAG,
    "word": st.one_of(st.none(), st.integers(), st.just("geluu"), st.lists(st.text(), max_size=1), NESTED),
}  # fmt: skip
ANY_VALUE = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 99), st.floats(), TEXTS, HUGE, NESTED
)


# --- configs ----------------------------------------------------------------------------------


@st.composite
def malformed(draw: st.DrawFn) -> dict[str, Any]:
    """A legal config of any type with one to three keys of its table made wrong."""
    model_type, shape = draw(st.sampled_from(CASES))
    keys = FAMILIES[model_type].keys
    names = draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=3, unique=True))
    wrong = {name: draw(WRONG[keys[name].kind]) for name in names}
    return {"model_type": model_type} | shape | wrong


@settings(QUIET)
@given(malformed())
def test_a_malformed_config_ends_in_an_input_error(config: dict[str, Any]) -> None:
    with in_time(), pytest.raises(InputError) as caught:
        from_hf(config, "x")
    check_report(caught.value)


INNER = ["layer_types", "rope_parameters", "rope_scaling", "no_rope_layers", "mlp_only_layers",
         "attn_config", "text_config", "vision_config", "sliding_window", "use_sliding_window",
         "max_window_layers", "decoder_sparse_step", "topk_method", "partial_rotary_factor",
         "sliding_window_pattern", "architectures", "first_k_dense_replace"]  # fmt: skip
ROPE_WORDS = ["type", "factor", "rope_theta", "rope_type", "full_attention", "model_type",
              "partial_rotary_factor", "short_factor", "original_max_position_embeddings"]  # fmt: skip


@st.composite
def arbitrary(draw: st.DrawFn) -> dict[str, Any]:
    """Any values under the keys that some type reads, inner ones included; some keys absent."""
    model_type, shape = draw(st.sampled_from(CASES))
    names = st.sampled_from(sorted({*FAMILIES[model_type].keys, *INNER}))
    value = st.recursive(
        ANY_VALUE,
        lambda below: st.one_of(
            st.lists(below, max_size=3),
            st.dictionaries(st.sampled_from(ROPE_WORDS), below, max_size=3),
        ),
        max_leaves=5,
    )
    absent = draw(st.sets(names, max_size=3))
    given_keys = {key: value for key, value in shape.items() if key not in absent}
    for inner in sorted({"vision_config", "text_config"} & set(given_keys)):
        inside = st.dictionaries(st.sampled_from(sorted(shape[inner])), ANY_VALUE, max_size=2)
        given_keys[inner] = shape[inner] | draw(inside)
    return {"model_type": model_type} | given_keys | draw(st.dictionaries(names, value, max_size=3))


@settings(QUIET)
@given(arbitrary())
def test_any_values_in_a_config_give_a_spec_that_counts_or_an_input_error(
    config: dict[str, Any],
) -> None:
    with in_time():
        try:
            arch = from_hf(config, "x")
        except InputError as error:
            return check_report(error)
        return check_counts(arch)


def heads_of(model_type: str) -> str | None:
    """The key of a type that says the number of heads."""
    return next(
        (name for name, key in FAMILIES[model_type].keys.items() if key.says == "n_heads"), None
    )


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_heads_that_do_not_divide_need_a_head_size(model_type: str) -> None:
    """37 divides no width here. Where the class has a size of head of its own, that serves."""
    shape = next(shape for name, shape in CASES if name == model_type)
    heads = heads_of(model_type)
    keys = FAMILIES[model_type].keys
    sizes = ("head_dim", "d_kv", "kv_lora_rank")
    own = any(k in keys and (keys[k].default or k in shape) for k in sizes)
    if heads is None:
        pytest.skip("the heads are those of the language model inside")
    config = {"model_type": model_type} | shape | {heads: 37}
    config |= {key: 37 for key in ("num_key_value_heads", "num_kv_heads") if key in config}
    if own:
        return check_counts(from_hf(config, "x"))
    with pytest.raises(InputError, match="37") as caught:
        from_hf(config, "x")
    return check_report(caught.value)


# --- text: what no value can say -----------------------------------------------------------------

#: Refused wherever they stand.
FATAL_JSON = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "-" + "9" * 5000, "01", "1.",
              "[" * 500 + "]" * 500, '{"a":' * 500 + "1" + "}" * 500, '"\\ud800"', "[1, 2", "nul", "",
              '"' + "x" * 70_000 + '"', '{"a": 1, "a": 2}', "[" + "0," * 60_000 + "0]"]  # fmt: skip
OTHER_JSON = ["null", "true", "-1", "0", "1", "2", "1.5", "1e-30", "1e30", "999999999999", '""', "[]",
              "{}", '"none"', '"\\u0000"', "[[1]]", '{"type": "yarn"}']  # fmt: skip


def config_text(config: dict[str, Any], token: str, name: str) -> bytes:
    """A config as a file, with `token` as the value of one key."""
    mark = "@@@"
    text = json.dumps(config | {name: mark}).replace(f'"{mark}"', token)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def config_files(draw: st.DrawFn) -> tuple[bytes, bool]:
    """A config's bytes with one value as no program writes it, and whether it must be refused."""
    model_type, shape = draw(st.sampled_from(CASES))
    fatal = draw(st.booleans())
    token = draw(st.sampled_from(FATAL_JSON if fatal else OTHER_JSON))
    name = draw(st.sampled_from(sorted({*FAMILIES[model_type].keys, "odd", "rope_scaling"})))
    return config_text({"model_type": model_type} | shape, token, name), fatal


@settings(QUIET)
@given(config_files())
def test_any_text_of_a_config_is_read_or_refused_with_a_place(case: tuple[bytes, bool]) -> None:
    data, fatal = case
    with in_time():
        try:
            arch = read_hf(parse_json(data, "config.json"), "x").arch
        except InputError as error:
            return check_report(error)
        assert not fatal
        return check_counts(arch)


# --- spec files ---------------------------------------------------------------------------------

SPECS = [
    write_spec(zoo.entry(name).arch)
    for name in ("gpt2", "llama-3-8b", "gemma-2-2b", "gemma-3-1b", "deepseek-v3", "t5-base", "gpt-oss-20b",
                 "llava-1.5-7b", "chinchilla-70b", "opt-350m", "mpt-7b", "qwen1.5-moe-a2.7b")
]  # fmt: skip
FATAL_TOML = ["nan", "inf", "-inf", "1e400", "9" * 5000, "-" + "9" * 5000, "01", "1979-05-27", "null",
              "[" * 500 + "]" * 500, "{a = " * 40 + "1" + "}" * 40, '"\\ud800"', "[1, 2", "", '"a\nb"',
              "{ a = 1, a = 2 }", "'" + "x" * 9_000, ".".join("a" * 4000) + " = 1"]  # fmt: skip
OTHER_TOML = ["true", "-1", "0", "1", "3", "1.5", "1e30", "999_999_999_999", "1_000_000_000_000_000", '""',
              "[]", "{}", '"none"', '"rope"', '{ kind = "alibi" }', '{ kind = "window", window = 9 }',
              '["layer*99999"]', "0x7fff", '"\\u0000"']  # fmt: skip
_VALUE = re.compile(r'(?<== )(?:"[^"\n]*"|\[[^\]\n]*\]|[\w.+-]+)')
_LINE = re.compile(r"^.+\n", re.MULTILINE)


@st.composite
def spec_files(draw: st.DrawFn) -> tuple[bytes, bool]:
    """A spec file with one to three values replaced, or lines left out or said twice."""
    text, fatal = draw(st.sampled_from(SPECS)), False
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["fatal", "value", "value", "value", "drop", "twice"]))
        places = list((_VALUE if how in ("fatal", "value") else _LINE).finditer(text))
        place = draw(st.sampled_from(places)) if places else None
        if place is None:
            continue
        new = {"drop": "", "twice": place.group() * 2}.get(how)
        if new is None:
            new = draw(st.sampled_from(FATAL_TOML if how == "fatal" else OTHER_TOML))
        fatal = how == "fatal" or (fatal and how == "value")
        text = text[: place.start()] + new + text[place.end() :]
        if how == "fatal":
            break  # a later change could take it out again
    return text.encode("utf-8", "surrogatepass"), fatal


@settings(QUIET)
@given(spec_files())
def test_any_text_of_a_spec_is_read_or_refused_with_a_place(case: tuple[bytes, bool]) -> None:
    data, fatal = case
    with in_time():
        try:
            arch = parse_spec(data, "spec.toml")
        except InputError as error:
            return check_report(error)
        assert not fatal
        return check_counts(arch)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a table's values stand."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, below in items:
        yield (*path, key)
        yield from leaves(below, (*path, key))


@st.composite
def spec_tables(draw: st.DrawFn) -> dict[str, Any]:
    """A parsed spec, as a recipe may hold one, with values of any kind in any places."""
    table: dict[str, Any] = tomllib.loads(draw(st.sampled_from(SPECS)))
    value = st.one_of(ANY_VALUE, st.just(date(2020, 1, 1)), st.lists(st.integers(), max_size=2))
    for path in draw(st.lists(st.sampled_from(list(leaves(table))), min_size=1, max_size=3)):
        below: Any = table
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier change took it out
            for key in path[:-1]:
                below = below[key]
            below[path[-1]] = draw(value)
    return table


@settings(QUIET)
@given(spec_tables())
def test_any_values_in_a_spec_give_one_that_counts_or_an_input_error(table: dict[str, Any]) -> None:
    with in_time():
        try:
            arch = spec_from_table(table, "spec")
        except InputError as error:
            return check_report(error)
        return check_counts(arch)


# --- recipes ------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {"seq_len": 8, "batch_size": 2, "steps": 4, "learning_rate": 0.01,
                          "model": "gpt2", "warmup_steps": 1, "betas": [0.9, 0.95]}  # fmt: skip
RECIPE_KEYS = [*(field.name for field in fields(Recipe)), "lerning_rate"]
NEEDED = [f.name for f in fields(Recipe) if f.default is MISSING and f.default_factory is MISSING]


@settings(QUIET)
@given(st.dictionaries(st.sampled_from(RECIPE_KEYS), ANY_VALUE, min_size=1, max_size=4),
       st.sets(st.sampled_from(RECIPE_KEYS), max_size=2))  # fmt: skip
def test_any_values_in_a_recipe_give_a_recipe_or_an_input_error(
    values: dict[str, Any], absent: set[str]
) -> None:
    table = {key: value for key, value in (RECIPE | values).items() if key not in absent}
    with in_time():
        try:
            recipe = parse_recipe(table, "recipe.toml")
        except InputError as error:
            return check_report(error)
    assert recipe.steps >= 1
    assert set(NEEDED) <= set(table) <= {field.name for field in fields(Recipe)}
    return None


@settings(QUIET)
@given(
    st.sampled_from(RECIPE_KEYS),
    st.sampled_from(FATAL_TOML),
    st.sampled_from([b"", b"\xff", b"\0"]),
)
def test_a_recipe_no_parser_takes_is_refused(name: str, token: str, after: bytes) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in RECIPE.items() if key != name]
    data = "\n".join([*lines, f"{name} = {token}"]).encode("utf-8", "surrogatepass") + after
    with tempfile.TemporaryDirectory() as folder, in_time():
        path = Path(folder) / "recipe.toml"
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_recipe(path)
    check_report(caught.value)


# --- the command line ---------------------------------------------------------------------------


@settings(QUIET, max_examples=max(30, MALFORMED // 10))
@given(st.one_of(config_files().map(lambda c: ("config.json", *c)),
                 spec_files().map(lambda c: ("spec.toml", *c))))  # fmt: skip
def test_the_command_ends_with_2_and_a_line_per_problem(case: tuple[str, bytes, bool]) -> None:
    name, data, fatal = case
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, in_time():
        path = Path(folder) / name
        path.write_bytes(data)
        quiet = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with quiet[0], quiet[1], pytest.raises(SystemExit) as ended:
            run(["count", str(path)])
    assert ended.value.code in ((2,) if fatal else (0, 2)), err.getvalue()
    if ended.value.code == 2:
        lines = err.getvalue().splitlines()
        assert lines
        assert all(line.startswith("error: ") and "must " in line for line in lines)
        assert not out.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is read from Linux's /proc")
def test_the_bounds_can_be_felt() -> None:
    with pytest.raises(MemoryError):
        bytearray(2**31)
