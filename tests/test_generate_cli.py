"""isoflop generate: from a run, from a folder of weights, from a spec."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isoflop.arch import llama
from isoflop.cli import generate_source
from isoflop.cli.export import export
from isoflop.cli.generate import generate
from isoflop.cli.outputs import validate
from isoflop.count import Precision, Workload
from isoflop.errors import Infeasible, InputError
from isoflop.model import build
from isoflop.model.weights import save_model
from isoflop.train import Recipe
from isoflop.train.data import ByteCorpus
from isoflop.train.loop import train
from isoflop.train.trained import load_trained

ARCH = llama("tiny", d_model=16, n_layers=2, n_heads=2, d_ff=24, vocab_size=256, max_seq_len=16)
RECIPE = Recipe(seq_len=16, batch_size=2, steps=3, learning_rate=1e-2, eval_bytes=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(RECIPE, ARCH, ByteCorpus.python_library(50_000), folder)
    return folder


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tiny"
    export(run, output=path, as_json=True)
    return path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    def call(source: object, *prompts: str, **options: object) -> dict:
        capsys.readouterr()
        generate(str(source), *prompts, as_json=True, **options)
        text = capsys.readouterr().out
        validate("generate", text)
        return json.loads(text)

    return call


def test_a_run_and_its_export_write_the_same_text(said, run, folder):
    one = said(run, "def f", "import ", max_tokens=9, temperature=0.9, seed=3)
    two = said(folder, "def f", "import ", max_tokens=9, temperature=0.9, seed=3)
    assert (one["origin"], two["origin"]) == ("run", "folder")
    assert one["texts"] == two["texts"]
    first = one["texts"][0]
    assert bytes(first["prompt_tokens"]) == b"def f"
    assert bytes(first["tokens"]).decode(errors="replace") == first["text"]
    greedy = said(run, "def f", max_tokens=1)["texts"][0]["tokens"]
    logits = load_trained(run).model(torch.tensor([list(b"def f")]))
    assert greedy == [int(logits[0, -1].argmax())]


def test_it_says_what_the_cache_takes_and_how_long_it_was(said, run):
    data = said(run, "def f", max_tokens=9)
    assert (
        data["bytes_kv_cache"] == 2 * 2 * (5 + 9 - 1) * 16 * 4
    )  # k and v, layers, tokens, D, fp32
    assert data["seconds_prefill"] > 0
    assert data["seconds_per_token"] > 0
    assert said(run, "def f", max_tokens=1)["seconds_per_token"] is None


def test_precision_is_what_weights_and_cache_are_kept_in(said, folder):
    ids = {"ids": True, "max_tokens": 4}
    full, half = (said(folder, "5 0, 17", precision=p, **ids) for p in (None, Precision.BF16))
    assert (full["precision"], half["precision"]) == ("fp32", "bf16")
    assert full["bytes_kv_cache"] == 2 * half["bytes_kv_cache"]


def test_with_numbers_for_prompts_numbers_are_written(said, folder, capsys):
    text = said(folder, "5 0,17\n2", ids=True, max_tokens=4)["texts"][0]
    assert text["prompt_tokens"] == [5, 0, 17, 2]
    assert text["text"] is None
    generate(str(folder), "5 0 17 2", ids=True, max_tokens=4)
    assert capsys.readouterr().out.split() == [str(token) for token in text["tokens"]]


def test_a_spec_writes_untrained_and_says_so(said, capsys, tmp_path):
    (tmp_path / "spec.json").write_text('{"model_type": "gpt2", "n_embd": 16, "n_layer": 1, '
                                        '"n_head": 2, "vocab_size": 300, "n_positions": 32}')  # fmt: skip
    generate(str(tmp_path / "spec.json"), "hello", max_tokens=4)
    out, err = capsys.readouterr()
    assert len(out.split()) == 4
    assert "untrained" in err
    assert "ended by length" in err
    assert said(tmp_path / "spec.json", "hello", max_tokens=4)["origin"] == "spec"


def test_the_stream_of_one_prompt_is_its_text_and_several_are_told_apart(said, run, capsys):
    options = {"max_tokens": 12, "temperature": 1.2}
    texts = [text["text"] for text in said(run, "def f", "x = ", **options)["texts"]]
    generate(str(run), "def f", **options)
    assert capsys.readouterr().out == shown(texts[0]) + "\n"
    generate(str(run), "def f", "x = ", **options)
    out = capsys.readouterr().out
    assert out == f"def f{shown(texts[0])}\n\nx = {shown(texts[1])}\n\n"


def shown(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def test_without_a_cache_the_same_is_written_and_none_is_held(said, run):
    with_, without = (said(run, "def f", max_tokens=6, cache=c) for c in (True, False))
    assert with_["texts"] == without["texts"]
    assert without["bytes_kv_cache"] == 0


def test_a_folders_own_end_and_tokenizer_are_used(said, folder, tmp_path):
    library = pytest.importorskip("tokenizers")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    free = said(tmp_path, "5", ids=True, max_tokens=8, temperature=1.0)["texts"][0]
    stop = free["tokens"][3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 999]}))
    ended = said(tmp_path, "5", ids=True, max_tokens=8, temperature=1.0)["texts"][0]
    assert ended["tokens"] == free["tokens"][: free["tokens"].index(stop) + 1]
    assert ended["reason"] == "token"
    vocabulary = {f"w{i}": i for i in range(256)}
    words = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    told = said(tmp_path, "w5 w17", max_tokens=2, temperature=1.0)["texts"][0]
    assert told["prompt_tokens"] == [5, 17]
    assert told["text"].split() == [f"w{token}" for token in told["tokens"]]


@pytest.mark.parametrize("name", ["run", "folder"])
def test_a_zero_byte_ends_what_a_run_and_its_export_write(said, name, request):
    source = request.getfixturevalue(name)
    data = said(source, *["\0"] * 8, max_tokens=200, temperature=3.0, seed=1)
    ended = [text for text in data["texts"] if text["reason"] == "token"]
    assert ended
    assert all(text["tokens"].index(0) == len(text["tokens"]) - 1 for text in ended)
    assert not any("\0" in text["text"] for text in ended)


# --- refused --------------------------------------------------------------------------------


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        generate(*map(str, arguments), **options)
    return str(caught.value)


def test_what_cannot_be_written_is_refused_with_what_would_be_right(folder, run, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert "--tokenizer bytes" in refused(tmp_path, "hello")
    assert "be UTF-8" in refused(folder, "a\udcff")
    assert "PROMPT is missing" in refused(run)
    assert "token numbers" in refused(run, "5 x", ids=True)
    assert "have at least one token" in refused(run, "")
    assert "0 to 255" in refused(run, "256", ids=True)
    assert "counted, not run" in refused(run, "a", precision=Precision.INT4)
    assert "temperature 0" in refused(run, "a", top_k=3)
    assert "config.json" in refused(run / "checkpoints", "a")
    assert "did you mean" in refused("gpt2-smal", "a")
    assert "tokenizer" in refused(run, "a", tokenizer=str(tmp_path / "none.json"))


@pytest.mark.parametrize("value", [True, "end", [1, None], 2.5])
def test_an_end_that_is_no_token_is_refused(value, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "eos_token_id" in refused(tmp_path, "5", ids=True)


def test_a_model_too_large_for_the_machine_is_refused_with_both_numbers():
    with pytest.raises(Infeasible, match=r"698\.4 GB of weights and .* of key-value cache"):
        generate("gpt3-175b", "a")


def test_what_a_source_will_hold_is_what_it_holds(run, folder):
    for path, precision in ((run, None), (folder, None), (folder, Precision.BF16)):
        source = generate_source.find_source(str(path), precision)
        model = source.load()
        held = sum(weight.nbytes for weight in model.parameters())
        expected = generate_source.bytes_weights(source.arch, source.precision).value
        assert held == expected
        generate_source.check_memory(source, Workload.decode(1, 8))


def test_an_encoder_decoder_in_a_folder_begins_as_its_config_says(said, tmp_path):
    from isoflop.arch.families import t5

    arch = t5("t5", d_model=12, n_layers=1, n_heads=3, d_head=4, d_ff=16, vocab_size=64)
    save_model(build(arch), tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    config["decoder_start_token_id"] = 7
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config))
    source = generate_source.find_source(str(tmp_path / "t5"), None)
    assert source.start == (7,)
    assert len(said(tmp_path / "t5", "5 6", "1", ids=True, max_tokens=3)["texts"]) == 2
    assert replace(source, start=()).arch == source.arch


def test_the_command_line_takes_its_options(folder):
    done = subprocess.run(
        [sys.executable, "-m", "isoflop", "generate", str(folder), "5 6", "7", "--ids", "--no-cache",
         "--max-tokens", "3", "--temperature", "0.5", "--top-p", "0.9", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    validate("generate", done.stdout)
    assert [len(text["tokens"]) for text in json.loads(done.stdout)["texts"]] == [3, 3]
