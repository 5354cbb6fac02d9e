"""A trained run goes out as a folder that other software reads, and comes back the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, gpt, llama
from isoflop.arch.families import gemma2
from isoflop.arch.zoo import entry, names
from isoflop.cli.export import export
from isoflop.cli.outputs import validate
from isoflop.errors import InputError
from isoflop.infer.tokens import ByteTokenizer, FileTokenizer, byte_tokenizer_files
from isoflop.model import build_decoder
from isoflop.model.weights import load_model
from isoflop.model.weights.tables.registry import TYPES
from isoflop.runs.text import decode, encode
from isoflop.train import Recipe, trained
from isoflop.train.data import ByteCorpus
from isoflop.train.loop import summarize, train
from isoflop.train.trained import arch_of, load_trained

ARCH = llama("tiny", d_model=16, n_layers=2, n_heads=2, d_ff=24, vocab_size=256, max_seq_len=16)
RECIPE = Recipe(seq_len=16, batch_size=2, steps=3, learning_rate=1e-2, eval_bytes=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(RECIPE, ARCH, ByteCorpus.python_library(50_000), folder)
    return folder


def test_a_run_is_exported_and_read_back_with_the_weights_of_its_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run, output=tmp_path / "hf", as_json=True)
    text = capsys.readouterr().out
    validate("export", text)
    said = json.loads(text)
    assert said["step"] == 3
    assert [file["name"] for file in said["files"]] == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    ours, back = load_trained(run).model.state_dict(), load_model(tmp_path / "hf").state_dict()
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)


def test_an_export_may_be_cast_and_cut_into_shards(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run, output=tmp_path / "hf", precision="bf16", max_shard=4_000)
    assert "at step 3" in capsys.readouterr().out
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert load_model(tmp_path / "hf").final_norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", [llama, gemma2, gpt])
def test_a_scale_of_logits_that_no_config_says_goes_into_the_final_norm(
    family: Callable[..., Arch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arch = family("muP", d_model=16, n_layers=2, n_heads=2, vocab_size=256, max_seq_len=16,
                  **({} if family is gpt else {"d_ff": 24}))  # fmt: skip
    model = build_decoder(replace(arch, head=replace(arch.head, scale=0.375)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    tokens_BT = torch.tensor([list(b"a scale of 3/8")])
    expected = model.eval()(tokens_BT)
    monkeypatch.setattr(trained, "load_trained", lambda _run: trained.Trained(model, 3, ()))
    export(tmp_path, output=tmp_path / "hf")
    assert "head.scale 0.375 is in the final norm" in capsys.readouterr().err
    assert torch.allclose(load_model(tmp_path / "hf").eval()(tokens_BT), expected, atol=1e-5)


# --- bytes as tokens ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    export(run, output=folder, as_json=True)
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("  two spaces before,\r\n\n\ttwo lines ,  don't . ")
@example("\0\u0100\ufffd\U0001f600 e\u0301 \u212b <s></s><unk><|endoftext|>")
def test_other_software_reads_any_text_as_its_bytes_and_gives_it_back(
    tokenizer: Any, text: str
) -> None:
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.binary() | st.text().map(str.encode))
def test_bytes_that_are_no_text_are_read_as_our_own_reader_does(
    tokenizer: Any, data: bytes
) -> None:
    expected = ByteTokenizer().decode(data)
    assert tokenizer.decode(list(data)) == expected
    ours = FileTokenizer(Path(tokenizer.name_or_path))
    stream = ours.stream()
    assert "".join(map(stream.add, data)) + stream.end() == expected


@pytest.mark.parametrize("model_type", sorted(TYPES))
def test_no_family_adds_tokens_of_its_own(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, text in byte_tokenizer_files(16).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 256}))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = " <s> <|endoftext|><unk>[PAD]</s>  don't é \n"
    assert len(read) == 256
    assert read(text).input_ids == list(text.encode())


def test_transformers_writes_on_and_ends_at_the_byte_that_parts_documents(
    run: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    export(run, output=tmp_path / "hf", as_json=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == 0
    tokens_BT = torch.tensor([list(b"def f")])
    written = model.generate(tokens_BT, do_sample=False, max_new_tokens=1, pad_token_id=0)
    assert written[0, -1] == load_trained(run).model(tokens_BT)[0, -1].argmax()


# --- what cannot be exported --------------------------------------------------------------------


def test_a_run_without_a_checkpoint_and_a_folder_that_is_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_trained(tmp_path)
    corpus = ByteCorpus.python_library(50_000)
    train(RECIPE, ARCH, corpus, tmp_path / "early", stop_after=0)
    for left in (tmp_path / "early" / "checkpoints").glob("*/model.safetensors"):
        left.unlink()
    with pytest.raises(InputError, match="be there and whole"):
        load_trained(tmp_path / "early")
    with pytest.raises(InputError, match="isoflop train"):
        arch_of({}, "x")


def test_every_decoder_of_the_zoo_is_known_again_from_a_manifest() -> None:
    decoders = [entry(name).arch for name in names()]
    decoders = [arch for arch in decoders if arch.encoder is None and arch.vision is None]
    assert len(decoders) > 140
    for arch in decoders[::7]:
        assert arch_of(decode(encode({"arch": summarize(arch)})), "manifest") == arch
