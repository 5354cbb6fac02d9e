"""Generation: the tokens of transformers, the same in any batch, with and without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isoflop.arch import Attention, Dense, LatentAttention, Layer, llama
from isoflop.arch.families import gpt, t5
from isoflop.arch.spec import DynamicScaling, LongRopeScaling, RmsNorm, Rope, Window
from isoflop.errors import InputError
from isoflop.infer import (
    ByteTokenizer,
    FileTokenizer,
    Generation,
    Request,
    Sampling,
    generate,
    pieces,
    stream,
)
from isoflop.infer.stops import Ending
from isoflop.model import build
from isoflop.model.weights import load_model
from parity_oracle import V, shake

TINY = llama("tiny", d_model=12, n_layers=2, n_heads=3, n_kv_heads=1, d_ff=16, vocab_size=V,
             max_seq_len=32)  # fmt: skip
KINDS = {
    "window": Attention(3, 1, 4, position=Rope(), span=Window(5)),
    "latent": LatentAttention(3, 8, 4, 2, 6),
    "grouped": Attention(4, 2, 4, position=Rope()),
}
PROMPTS = [[5, 0, 60, 17, 17, 3, 42, 8, 1], [7], [2, 3, 4, 5]]
RANDOM = Sampling(temperature=0.8, top_k=30, top_p=0.95, min_p=0.001, repetition_penalty=1.2)


def lively(arch=TINY, **changes):
    model = build(replace(arch, **changes)).eval()
    shake(model)
    return model


def of(kind):
    layer = Layer(KINDS[kind], Dense(16), RmsNorm())
    return lively(layers=(layer, layer))


def tokens_of(model, prompts, request):
    return [list(x.tokens) for x in generate(model, prompts, request)]


# --- transformers as the oracle -------------------------------------------------------------


def shrunk(name: str):
    """A model of transformers with random weights that matter."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    common = {"vocab_size": V, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
              "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
              "pad_token_id": 0}  # fmt: skip
    grouped = {**common, "intermediate_size": 72, "num_key_value_heads": 2}
    local = {**grouped, "head_dim": 8, "sliding_window": 5}
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=48, n_layer=2, n_head=6, n_positions=64, vocab_size=V,
                                    bos_token_id=None, eos_token_id=None)),
        "bloom": lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=V, hidden_size=48, n_layer=2, n_head=6,
                                     bos_token_id=None, eos_token_id=None)),
        "mistral": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**grouped, sliding_window=5)),
        "gemma 2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**local)),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**grouped, num_local_experts=4)),
        "deepseek v2": lambda: transformers.DeepseekV2ForCausalLM(
            transformers.DeepseekV2Config(
                **{**grouped, "num_key_value_heads": 6}, kv_lora_rank=20, qk_nope_head_dim=10,
                qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=None, first_k_dense_replace=2,
                n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=V, d_model=48, d_kv=8, d_ff=72, num_layers=2,
                                  num_heads=6, eos_token_id=None, pad_token_id=0,
                                  decoder_start_token_id=0)),
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = made[name]().eval()
    shake(theirs)
    return theirs


FAMILIES = ("llama", "gpt2", "bloom", "mistral", "gemma 2", "mixtral", "deepseek v2", "t5")


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_of_a_batch_are_those_of_transformers_for_each_prompt(name, tmp_path):
    """With a repetition penalty, for random weights like to say one token for ever."""
    theirs = shrunk(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    start = (0,) if name == "t5" else ()
    sampling = Sampling(temperature=0.0, repetition_penalty=8.0)
    got = tokens_of(ours, PROMPTS, Request(20, sampling, start=start))
    for prompt, row in zip(PROMPTS, got, strict=True):
        said = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                               max_new_tokens=20, do_sample=False, repetition_penalty=8.0)  # fmt: skip
        assert row == said[0, -20:].tolist()
        assert len(set(row)) > 5


# --- the same by every road -----------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), RANDOM], ids=["greedy", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_the_same_alone_in_a_batch_and_without_a_cache(kind, sampling):
    model = of(kind)
    together = tokens_of(model, PROMPTS, Request(16, sampling, seed=5))
    alone = [tokens_of(model, [prompt], Request(16, sampling, seed=5 + i))[0]
             for i, prompt in enumerate(PROMPTS)]  # fmt: skip
    assert together == alone
    assert tokens_of(model, PROMPTS, Request(16, sampling, seed=5, cached=False)) == together


def test_an_encoder_decoder_writes_the_same_by_every_road():
    model = lively(t5("t5", d_model=12, n_layers=2, n_heads=3, d_head=4, d_ff=16, vocab_size=V))
    request = Request(12, RANDOM, seed=5, start=(0, 4))
    together = tokens_of(model, PROMPTS, request)
    for i, prompt in enumerate(PROMPTS):
        assert tokens_of(model, [prompt], replace(request, seed=5 + i))[0] == together[i]
    assert tokens_of(model, PROMPTS, replace(request, cached=False)) == together


def test_seeds_say_what_is_drawn():
    model = of("grouped")
    same = [tokens_of(model, [PROMPTS[0]] * 2, Request(16, RANDOM, seed)) for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]
    assert same[0][0] != same[0][1], "rows of a batch draw for themselves"


def test_a_shorter_text_is_the_beginning_of_a_longer_one():
    model = of("grouped")
    short, long = (tokens_of(model, PROMPTS, Request(n, RANDOM)) for n in (1, 12))
    assert short == [row[:1] for row in long]


def test_a_heavy_repetition_penalty_writes_no_token_twice_and_none_of_the_prompt():
    sampling = Sampling(temperature=0.0, repetition_penalty=1e9)
    (row,) = tokens_of(of("grouped"), [PROMPTS[2]], Request(30, sampling))
    assert len({*row, *PROMPTS[2]}) == 30 + len(PROMPTS[2])


# --- where a text ends ----------------------------------------------------------------------


def test_a_text_ends_at_a_stop_token_while_others_go_on():
    model = of("grouped")
    free = tokens_of(model, PROMPTS, Request(16, RANDOM))
    stop = free[0][6]
    done = generate(model, PROMPTS, Request(16, RANDOM, stop_tokens=(stop,)))
    for row, completion in zip(free, done, strict=True):
        n = row.index(stop) + 1 if stop in row else 16
        assert list(completion.tokens) == row[:n]
        assert completion.reason == ("token" if stop in row else "length")
        assert completion.text is None


class Words:
    """A tokenizer whose tokens are pieces of several characters."""

    def __init__(self, words):
        self.words = words

    def encode(self, text):
        raise NotImplementedError

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)

    def stream(self):
        words = self.words

        class Stream:
            def add(self, token):
                return words[token]

            def end(self):
                return ""

        return Stream()


@given(
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_text_ends_a_text_however_tokens_cut_it(words, stops):
    ending, given_out, whole = Ending((), stops, Words(words).stream()), [], ""
    for i, word in enumerate(words):
        whole += word
        given_out.append(ending.add(i, is_last=i == len(words) - 1))
        found = [whole.find(stop) for stop in stops if stop in whole]
        assert (ending.reason == "text") == bool(found)
        if found:
            break
        assert whole.startswith("".join(given_out)), "what was given out is never taken back"
    assert "".join(given_out) == (whole[: min(found)] if found else whole)


@given(st.text(max_size=20), st.binary(max_size=8))
def test_bytes_that_stream_are_the_text_they_are_at_once(text, rubbish):
    tokenizer = ByteTokenizer()
    tokens = [*tokenizer.encode(text), *rubbish]
    written = tokenizer.stream()
    grown = "".join(map(written.add, tokens)) + written.end()
    assert grown == tokenizer.decode(tokens) == bytes(tokens).decode(errors="replace")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_that_is_no_byte_is_no_text():
    assert ByteTokenizer().decode([104, 195, 300, 105]) == "h\ufffd\ufffdi"


def test_pieces_as_they_come_are_the_completion():
    model = lively(vocab_size=300, embedding=replace(TINY.embedding, n_rows=300))
    request, tokenizer = Request(24, Sampling(1.5), stop_texts=("e", "ab")), ByteTokenizer()
    come = list(stream(model, PROMPTS, request, tokenizer))
    done = generate(model, PROMPTS, request, tokenizer)
    for row, completion in enumerate(done):
        mine = [piece for piece in come if piece.row == row]
        assert tuple(piece.token for piece in mine) == completion.tokens
        assert "".join(piece.text for piece in mine) == completion.text
        assert [bool(piece.reason) for piece in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].reason == completion.reason
        assert not any(stop in completion.text for stop in request.stop_texts)


def test_a_tokenizer_of_a_folder_reads_writes_and_streams(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["the cat saw the other cat", "été, 猫"], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path)
    for text in ("the cat 猫 été", "🐈", ""):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        written = tokenizer.stream()
        assert "".join(map(written.add, tokens)) + written.end() == text
    cut = tokenizer.encode("a🐈")[:-1]
    written = tokenizer.stream()
    assert "".join(map(written.add, cut)) + written.end() == tokenizer.decode(cut)


@pytest.mark.parametrize("text", [None, "{", '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(text, tmp_path):
    pytest.importorskip("tokenizers")
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="tokenizer"):
        FileTokenizer(tmp_path)


# --- what cannot be written -----------------------------------------------------------------


def refused(model, prompts, request):
    with pytest.raises(InputError) as caught:
        generate(model, prompts, request)
    return [problem.field for problem in caught.value.problems]


def test_bad_prompts_are_refused_all_at_once():
    model = of("grouped")
    assert refused(model, [], Request(4)) == ["prompts"]
    assert refused(model, [[], [V], [1], [-1]], Request(4)) == [f"prompts[{i}]" for i in (0, 1, 3)]
    assert refused(model.train(), [[]], Request(4)) == ["model", "prompts[0]"]


def test_learned_positions_are_not_outgrown():
    model = lively(gpt("g", d_model=12, n_layers=1, n_heads=3, vocab_size=V, max_seq_len=16))
    assert refused(model, [[1] * 10], Request(8)) == ["tokens"]
    assert refused(model, [[1] * 10], Request(8, cached=False)) == ["tokens"]
    assert len(generate(model, [[1] * 10], Request(7))[0].tokens) == 7


def test_a_text_may_outgrow_positions_that_are_computed():
    assert len(generate(of("window"), [[1] * 30], Request(9))[0].tokens) == 9


def with_scaling(scaling):
    attention = Attention(3, 1, 4, position=Rope(scaling=scaling))
    return lively(layers=(Layer(attention, Dense(16), RmsNorm()),))


@pytest.mark.parametrize(
    ("scaling", "below", "above"),
    [
        (LongRopeScaling((1.0, 1.0), (9.0, 9.0), 16), (12, 5), (17, 9)),
        (DynamicScaling(4.0), (28, 5), (40, 1)),
    ],
    ids=["longrope", "dynamic"],
)
def test_cached_keys_that_a_longer_text_turns_otherwise_are_refused(scaling, below, above):
    """Each is fine on one side of where the turns change; across it, without a cache alone."""
    model = with_scaling(scaling)
    for length, n in (below, above):
        for cached in (True, False):
            assert len(generate(model, [[1] * length], Request(n, cached=cached))[0].tokens) == n
    length, n = below[0], below[1] + 1
    assert refused(model, [[1] * length, [1]], Request(n)) == ["position.scaling"]
    row = tokens_of(model, [[1] * length], Request(n, cached=False))[0]
    text = [1] * length + row
    with torch.no_grad():
        greedy = [int(model(torch.tensor([text[:i]]))[0, -1].argmax())
                  for i in range(length, length + n)]  # fmt: skip
    assert row == greedy


def test_an_encoder_decoder_says_what_its_answer_begins_with():
    model = lively(t5("t5", d_model=12, n_layers=1, n_heads=3, d_head=4, d_ff=16, vocab_size=V))
    assert refused(model, [[1]], Request(3)) == ["start"]
    assert refused(model, [[1], []], Request(3, start=(V,))) == ["prompts[1]", "start"]


def test_weights_that_are_no_numbers_are_refused():
    model = of("grouped")
    torch.nn.init.constant_(model.embedding.tokens.weight, torch.nan)
    assert refused(model, [[1]], Request(3)) == ["logits"]


def test_scores_that_overflow_later_are_refused_too():
    model, steps = of("grouped"), iter([1.0, torch.inf])
    model.embedding.register_forward_hook(lambda *given: given[-1] * next(steps))
    coming = Generation(model, [[1]], Request(3, Sampling(1.0))).steps()
    next(coming)
    with pytest.raises(InputError, match="logits=not finite"):
        next(coming)


@pytest.mark.parametrize("name", ["embedding.tokens", "layers.0.attention.q", "head"])
def test_weights_of_two_precisions_are_refused(name):
    model = llama("two", d_model=16, n_layers=1, n_heads=2, d_ff=24, vocab_size=32, max_seq_len=8)
    model = build(model).eval()
    model.get_submodule(name).bfloat16()
    assert refused(model, [[1]], Request(3)) == ["weights"]


def test_stop_texts_need_a_tokenizer():
    request = Request(3, stop_texts=("a",))
    assert refused(of("grouped"), [[1]], request) == ["tokenizer"]


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("seed", -1), ("stop_texts", ("",))]
)
def test_a_request_that_cannot_be_is_refused(field, value):
    with pytest.raises(InputError, match=field):
        Request(**{"max_tokens": 1, field: value})


# --- what is computed -----------------------------------------------------------------------


def test_every_token_is_read_once_and_the_head_sees_one_a_text():
    model, read, headed = of("grouped"), [], []
    model.layers[0].register_forward_pre_hook(lambda _, x: read.append(x[0].shape[:2]))
    model.head.register_forward_pre_hook(lambda _, x: headed.append(x[0].shape[:-1]))
    generate(model, PROMPTS, Request(5))
    assert read == [(3, 9)] + [(3, 1)] * 4
    assert headed == [(3,)] * 5


def test_texts_that_have_ended_stop_the_loop():
    model, read = of("grouped"), []
    (first,) = tokens_of(model, [PROMPTS[0]], Request(1))[0]
    model.layers[0].register_forward_pre_hook(lambda _, x: read.append(x[0].shape[:2]))
    generate(model, [PROMPTS[0]], Request(9, stop_tokens=(first,)))
    assert len(read) == 1


def test_a_generation_says_what_its_cache_takes_before_it_writes():
    generation = Generation(of("grouped"), PROMPTS, Request(8))
    assert (
        generation.bytes_kv_cache == 2 * 3 * (9 + 7) * 2 * 2 * 4 * 4
    )  # layers batch S kv K H fp32
    assert len(list(pieces(generation))) == 3 * 8
