"""Derived against built: what `isoflop check` compares, and that it can find a difference."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from isoflop.arch import Arch, zoo
from isoflop.arch.families.gpt import gpt
from isoflop.arch.families.llama import llama
from isoflop.arch.families.moe import deepseek, gpt_oss, mixtral
from isoflop.arch.spec import Activation, BlockSparse, Chunked, Dense, Experts, Window
from isoflop.arch.toml import write_spec
from isoflop.check import agree as agreeing
from isoflop.check import uneven
from isoflop.check.agree import agree
from isoflop.check.kept import OWN, bytes_kept, derived_bytes, reason_for
from isoflop.check.paths import Shallow
from isoflop.check.row import Row
from isoflop.check.stored import files_of, tokens_held
from isoflop.check.work import count_flops, inputs_for
from isoflop.check.zoo import Agreement, check_model
from isoflop.cli.agreement import render_rows
from isoflop.cli.check import check
from isoflop.cli.outputs import validate
from isoflop.count import Precision, Workload, bytes_saved
from isoflop.errors import Infeasible, InputError, UnknownName
from isoflop.model import build
from isoflop.model.experts import record_routing
from isoflop.model.experts.combine import combine
from isoflop.model.loss import mean_loss
from isoflop.model.recompute import RECOMPUTES, set_recompute
from isoflop.model.weights.header import bytes_of_file
from isoflop.model.weights.write import save_model, tensors_of_files

SHAPE = {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 97, "max_seq_len": 64}
DENSE = llama("dense", d_ff=48, n_kv_heads=2, **SHAPE)
MIXTURE = mixtral("mixture", d_ff=24, n_kv_heads=2, n_experts=4, n_active=2, **SHAPE)
LATENT = deepseek("latent", n_experts=8, n_active=2, d_ff=48, d_ff_expert=12, n_shared=1, n_dense=1,
                  n_groups=2, n_active_groups=1, corrected=True, **SHAPE)  # fmt: skip
SINKS = gpt_oss("sinks", n_kv_heads=2, d_ff=24, n_experts=4, n_active=2, **SHAPE)
DROPPED = gpt("dropped", dropout=0.1, **SHAPE)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def wrong(arch: Arch) -> list[str]:
    return [row.path for row in agree(arch) if not row.agrees]


# --- whole models -----------------------------------------------------------------------------

#: One of each kind; `make check-zoo` checks all.
SAMPLE = ["gpt2", "llama-3-8b", "gemma-2-2b", "bloom-560m", "opt-350m", "gopher-280b", "gpt3-175b",
          "deepseek-v3", "gpt-oss-20b", "qwen1.5-moe-a2.7b", "t5-small", "llava-1.5-7b",
          "command-r-plus-104b", "pythia-70m", "phi-2", "falcon-40b", "gemma-3-4b-vision", "qwen2.5-vl-3b"]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_models_of_every_kind_agree_and_differences_have_reasons(name):
    agreement = check_model(name)
    assert agreement.agrees, agreement
    for row in agreement.rows:
        if not row.equal:
            assert row.is_total or row.reason, row
            assert not row.is_total or abs(row.derived / row.built - 1) < 0.002, row


def test_what_cannot_be_built_is_said(tmp_path):
    clamped = replace(DROPPED.layers[0].feed_forward, activation="silu_clamped")
    arch = replace(DROPPED, layers=(replace(DROPPED.layers[0], feed_forward=clamped),) * 2)
    (tmp_path / "odd.toml").write_text(write_spec(arch))
    agreement = check_model(str(tmp_path / "odd.toml"))
    assert "silu_clamped" in agreement.refused
    assert not agreement.agrees
    assert agreement.to_json()["numbers"] == 0


# --- a difference is found --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "paths"),
    [
        ({"d_ff": 49}, {"params/layer/feed_forward/up", "bytes", "disk/tensors",
                        "flops/layer/feed_forward/up", "flops_backward",
                        "saved_selective/layer/feed_forward/activation"}),
        ({"n_kv_heads": 4}, {"params/layer/attention/k", "cache/layer", "flops/layer/attention/v"}),
        ({"tied": True}, {"params/head", "disk/tensors"}),
    ],
)  # fmt: skip
def test_a_module_of_another_spec_disagrees(monkeypatch, changed, paths):
    other = llama("dense", **({"d_ff": 48, "n_kv_heads": 2} | SHAPE | changed))
    shallow = Shallow.of(other)
    monkeypatch.setattr(agreeing, "build", lambda _, **kinds: build(other, **kinds))
    monkeypatch.setattr(agreeing, "Shallow", SimpleNamespace(of=lambda _: shallow))
    assert paths <= set(wrong(DENSE))


def test_one_more_tensor_kept_is_found(monkeypatch):
    from isoflop.model import layer

    plain = layer.LayerModule.add

    def keeps_more(self, x: Tensor, change: Tensor) -> Tensor:
        return plain(self, x.sin().asin(), change)

    monkeypatch.setattr(layer.LayerModule, "add", keeps_more)
    assert {"saved_none", "saved_none/layer/residual"} <= set(wrong(DENSE))


def test_a_product_in_the_wrong_place_is_found(monkeypatch):
    from isoflop.model import layer

    plain = layer.LayerModule.add

    def multiplies(self, x: Tensor, change: Tensor) -> Tensor:
        return plain(self, x @ x.new_ones(x.shape[-1], x.shape[-1]), change)

    monkeypatch.setattr(layer.LayerModule, "add", multiplies)
    found = wrong(DENSE)
    assert {"flops", "flops/layer/residual", "flops_backward/layer/residual"} <= set(found)


def test_a_difference_needs_a_reason():
    assert reason_for("layer/attention/core")
    assert not reason_for("layer/feed_forward/up")
    assert not Row("params", 1, 2).agrees
    assert Row("params", 0, 0).agrees


# --- two layers of each kind stand for all ----------------------------------------------------


@pytest.mark.parametrize("arch", [
    replace(DENSE, layers=DENSE.layers * 2), replace(LATENT, layers=(LATENT.layers[0], *LATENT.layers[1:] * 3)),
    replace(SINKS, layers=SINKS.layers * 2),
], ids=lambda arch: arch.name)  # fmt: skip
def test_a_shallow_pass_is_that_of_the_whole_model(arch):
    shallow, whole = (
        Shallow.of(arch),
        Shallow(arch, {f"layers.{i}": 1 for i in range(arch.n_layers)}),
    )
    work = Workload.train(2, 40)
    assert len(shallow.arch.layers) < arch.n_layers
    found = []
    for of in (shallow, whole):
        module = build(of.arch, device="meta")
        forward, backward = count_flops(module, inputs_for(module, work))
        kept = []
        for recompute in RECOMPUTES:
            set_recompute(module, recompute)
            kept.append(of.by_path(bytes_kept(module, work)))
        found.append((of.by_path(forward), of.by_path(backward), kept))
    assert found[0] == found[1]


@pytest.mark.parametrize("span", [Window(1), Window(5), Chunked(8), BlockSparse(4, 2)], ids=str)
def test_a_span_shorter_than_the_sample_is_counted_where_it_hides_nothing(span):
    arch = llama("s", d_model=64, n_layers=1, n_heads=2, d_ff=24, vocab_size=32, max_seq_len=64)
    layer = arch.layers[0]
    arch = replace(arch, layers=(replace(layer, attention=replace(layer.attention, span=span)),))
    assert [
        row.path for row in agree(arch) if row.path.startswith("flops") and not row.agrees
    ] == []


def test_layers_of_one_kind_are_built_alike():
    for name in ("gemma-2-2b", "deepseek-v2-lite", "gpt-oss-20b", "t5-small"):
        arch = zoo.entry(name).arch
        model = build(arch, device="meta")
        seen: dict[str, list[tuple[str, type, torch.Size]]] = {}
        for spec, layer in zip(arch.layers, model.layers, strict=True):
            parts = [(n, type(layer.get_submodule(n.rpartition(".")[0])), p.shape)
                     for n, p in layer.named_parameters()]  # fmt: skip
            assert seen.setdefault(spec.name, parts) == parts


# --- bytes on disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [DENSE, MIXTURE, LATENT, SINKS, DROPPED], ids=lambda a: a.name)
@pytest.mark.parametrize("shard", [10**9, 10_000])
def test_files_are_as_large_as_said_without_weights(tmp_path, arch, shard):
    save_model(build(arch), tmp_path / "hf", max_shard_bytes=shard)
    real = sorted(p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors"))
    unborn = tensors_of_files(build(arch, device="meta"), max_shard_bytes=shard)
    assert sorted(map(bytes_of_file, unborn)) == real
    assert (len(real) > 1) == (shard == 10_000)


def test_kinds_of_numbers_and_odd_names_in_a_header(tmp_path):
    tensors = {
        "z": torch.zeros(3, dtype=torch.bfloat16), "a": torch.zeros(2, 5), 'é"': torch.zeros(1),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0, dtype=torch.float64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert bytes_of_file(tensors) == (tmp_path / "x.safetensors").stat().st_size


def test_a_model_of_no_family_is_a_checkpoint():
    (file,) = files_of(build(zoo.entry("gopher-44m").arch, device="meta"))
    assert "layers.0.attention.q.weight" in file


# --- caches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "n_tokens", "held"),
    [
        (Window(8), 50, 8), (Window(8), 5, 5), (Chunked(16), 50, 16), (Chunked(16), 9, 9),
        (BlockSparse(block=4, n_local=2), 50, 8), (BlockSparse(block=4, n_local=2, stride=4), 50, 50),
    ],
)  # fmt: skip
def test_a_layer_holds_what_a_later_token_may_look_at(span, n_tokens, held):
    attention = replace(DENSE.layers[0].attention, span=span)
    arch = replace(DENSE, layers=(replace(DENSE.layers[0], attention=attention),) * 2)
    module = build(arch, device="meta")
    assert tokens_held(module.layers[0].attention, n_tokens) == held
    assert not [path for path in wrong(arch) if path.startswith("cache")]


# --- saved activations ------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_quick", "silu", "relu_squared"])
def test_every_activation_function_keeps_what_is_derived(activation: Activation, gated, dropout):
    fed = Dense(48, activation, gated=gated, dropout=dropout)
    arch = replace(DENSE, layers=(replace(DENSE.layers[0], feed_forward=fed),) * 2)
    rows = [row for row in agree(arch) if "/feed_forward/" in row.path]
    assert [row for row in rows if not row.equal] == []


# Not latent attention: a CPU has no fused kernel for its two widths.
@pytest.mark.parametrize("arch", [DENSE, MIXTURE, SINKS, DROPPED], ids=lambda a: a.name)
def test_a_real_pass_keeps_what_the_meta_device_says(arch):
    """With weights, numbers and PyTorch's own choice of kernels; long enough for fused ones.

    The loss of whole logits, as off a CPU, where it goes by rows.
    """
    work = Workload.train(2, 520)
    arch = replace(arch, embedding=Shallow.of(arch).arch.embedding)
    tokens = torch.zeros(2, work.seq_len, dtype=torch.int64)
    model = build(arch)
    kept = {p.untyped_storage().data_ptr(): p for p in (*model.parameters(), *model.buffers())}
    bytes_there = sum(x.untyped_storage().nbytes() for x in kept.values())

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mean_loss(model(tokens), tokens)
    real = sum(x.untyped_storage().nbytes() for x in kept.values()) - bytes_there
    meta = sum(bytes_kept(build(arch, device="meta"), work).values())
    assert abs(real / meta - 1) < 0.001


@pytest.mark.parametrize("arch", [DENSE, MIXTURE, SINKS, DROPPED], ids=lambda arch: arch.name)
def test_losses_and_gradients_are_the_same_bits_under_every_policy(arch):
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    found = []
    for recompute in RECOMPUTES:
        model = build(arch)
        set_recompute(model, recompute)
        torch.manual_seed(3)
        loss = model.loss(tokens, tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_policy_can_be_taken_back_and_must_be_known():
    model = build(DENSE)
    names = list(model.state_dict())
    for recompute in ("full", "selective", "none"):
        set_recompute(model, recompute)
        assert list(model.state_dict()) == names
    assert not any({"forward", "shrink"} & set(vars(m)) for m in model.modules())
    with pytest.raises(UnknownName, match="selectiv"):
        set_recompute(model, "selectiv")


def test_the_product_behind_an_activation_is_not_made_again():
    model = build(DENSE, device="meta")
    work = Workload.train(2, 16)
    plain = count_flops(model, inputs_for(model, work))
    set_recompute(model, "selective")
    assert count_flops(model, inputs_for(model, work)) == plain
    set_recompute(model, "full")
    again = sum(count_flops(model, inputs_for(model, work))[1].values())
    head = plain[0]["head"]
    assert again == sum(plain[1].values()) + sum(plain[0].values()) - head - again_saves(
        model, work
    )


def again_saves(model, work: Workload) -> int:
    """The last product of each layer: nothing asks for its output again."""
    down = model.layers[0].feed_forward.down
    return len(model.layers) * 2 * work.batch * work.seq_len * down.weight.numel()


def test_half_precision_keeps_an_fp32_copy_of_what_the_router_reads():
    """bf16 on the meta device takes PyTorch's own RMSNorm, so mixtures alone are compared."""
    work = Workload.train(2, 1024)
    for arch in (MIXTURE, LATENT):
        module = build(Shallow.of(arch).arch, device="meta", dtype=torch.bfloat16)
        built = Shallow.of(arch).by_path(bytes_kept(module, work))
        tree = bytes_saved(arch, work, Precision.BF16, OWN)
        for path, leaf in tree.leaves().items():
            if "feed_forward/router" in path or path.endswith("shared/gate"):
                assert abs(int(leaf.value * tree.copies(path)) / built[path] - 1) < 0.1, path


def test_gates_have_the_gradients_of_a_plain_sum():
    generator = torch.Generator().manual_seed(0)
    y, gate = (torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True),
               torch.rand(6, generator=generator, dtype=torch.float64, requires_grad=True))  # fmt: skip
    token = torch.tensor([0, 2, 2, 1, 0, 3])
    assert torch.autograd.gradcheck(lambda a, b: combine(a, b, token, 5), (y, gate))
    plain = torch.zeros(5, 3, dtype=torch.float64).index_add(0, token, y * gate[:, None])
    assert torch.equal(combine(y, gate, token, 5), plain)


# --- mixtures under their own routing ---------------------------------------------------------


@pytest.mark.parametrize("arch", [MIXTURE, LATENT, SINKS], ids=lambda arch: arch.name)
def test_uneven_products_are_counted_one_by_one(monkeypatch, arch):
    small = uneven.small_mixtures(arch)
    with record_routing(model := build(small)) as routings:
        model.loss(uneven.some_tokens(), uneven.some_tokens())
    assert all(r.load.min() < r.load.max() for r in routings.values())
    assert all(row.equal for row in uneven.uneven_rows(arch))
    plain = uneven.OneByOne.__torch_function__

    def loses_a_row(self, func, types, args=(), kwargs=None):
        if func is torch.ops.isoflop.grouped_linear.default:
            x, weight, ends = args
            lost = plain(self, func, types, (x[1:], weight, (ends - 1).clamp(0)))
            return torch.cat([lost, lost[:1]])
        return plain(self, func, types, args, kwargs)

    monkeypatch.setattr(uneven.OneByOne, "__torch_function__", loses_a_row)
    assert not all(row.equal for row in uneven.uneven_rows(arch))


def test_a_dense_model_has_no_such_rows():
    assert list(uneven.uneven_rows(DENSE)) == []
    assert isinstance(MIXTURE.layers[0].feed_forward, Experts)


def test_policies_are_the_counts_own():
    work = Workload.train(1, 64)
    kept = [sum(derived_bytes(DENSE, work, r).values()) for r in RECOMPUTES]
    assert kept == sorted(kept, reverse=True)


def test_json_of_a_row():
    row = Row("saved_none", 99, 100, allowed=0.02)
    assert json.loads(json.dumps(row.to_json())) == {
        "path": "saved_none", "derived": 99, "built": 100, "equal": False, "agrees": True, "reason": "",
    }  # fmt: skip


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def _two_models(monkeypatch):
    monkeypatch.setattr(zoo, "names", lambda: ("gpt2", "pythia-14m"))


@pytest.mark.usefixtures("_two_models")
def test_the_zoo_is_summed_up_by_quantity(capsys):
    check(zoo=True, jobs=1)
    out = capsys.readouterr().out
    assert out.startswith("2 models: ")
    assert "0 disagree" in out.partition("\n")[0]
    assert "  params                2  equal\n" in out
    check(zoo=True, jobs=1, every=True)
    assert "  pythia-14m  " in capsys.readouterr().out
    check(zoo=True, jobs=1, as_json=True)
    validate("check", capsys.readouterr().out)


@pytest.mark.usefixtures("_two_models")
def test_a_model_that_disagrees_or_is_refused_ends_in_exit_3(monkeypatch, capsys):
    bad = Agreement("pythia-14m", (Row("params/layer", 8, 9), Row("params", 8, 9)))
    odd = Agreement("gpt2", refused="gpt2: no such thing")
    monkeypatch.setattr("isoflop.check.zoo.check_models", lambda *_: iter((bad, odd)))
    with pytest.raises(Infeasible, match="2 of 2 models disagree or cannot be built") as caught:
        check(zoo=True, jobs=1)
    assert caught.value.exit_code == 3
    out = capsys.readouterr().out
    assert "gpt2 cannot be built: gpt2: no such thing" in out
    assert re.search(r"params/layer +8 +9  off by -1 \(-11.11 %\)", out)
    with pytest.raises(Infeasible):
        check(zoo=True, jobs=1, as_json=True)
    validate("check", capsys.readouterr().out)


def test_one_model_shows_sums_then_what_differs_and_why():
    rows = agree(LATENT)
    short, long = (render_rows(LATENT, rows, every=every) for every in (False, True))
    assert short.count("attention/core") == 2  # of each kind of layer, not of each policy
    assert "off by" not in long
    assert len(long.splitlines()) == len(rows) + 2
    odd = render_rows(LATENT, (*rows, Row("flops/layer/new", 0, 5)), every=False)
    assert "1 disagree" in odd
    assert re.search(r"what disagrees, by path\n.*\n  flops/layer/new +0 +5  off by -5", odd)


@pytest.mark.parametrize("name", ["deepseek-v3", "t5-small", "llava-1.5-7b"])
def test_what_one_model_shows_fits_a_narrow_terminal(name):
    arch = zoo.entry(name).arch
    shown = render_rows(arch, agree(arch), every=False)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "MODEL=nothing"), ({"model": "gpt2", "zoo": True}, "MODEL=gpt2"),
        ({"zoo": True, "run": True}, "--run=given"), ({"model": "gpt2", "jobs": 2}, "--jobs=2"),
    ],
)  # fmt: skip
def test_the_command_refuses_what_names_no_model_or_too_many(given, said):
    model = given.pop("model", None)
    with pytest.raises(InputError, match=said):
        check(model, **given)


def test_a_model_so_narrow_that_turns_of_positions_show_agrees() -> None:
    narrow = llama("narrow", d_model=4, n_layers=1, n_heads=1, d_head=8, d_ff=4, vocab_size=16,
                   max_seq_len=16)  # fmt: skip
    assert all(row.agrees for row in agree(narrow))
