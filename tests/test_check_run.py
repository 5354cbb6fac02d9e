"""`isoflop check --run`: its size, a model cut down for it, and what a CPU runs of attention."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from isoflop.arch import Arch, gpt, llama, zoo
from isoflop.arch.families import t5
from isoflop.arch.spec import Alibi, Attention, Experts, RelativeBias, Window
from isoflop.attention import attention, choice, explain_dispatch
from isoflop.check.cut import changes, cut_down
from isoflop.check.run import Line, RunCheck
from isoflop.check.size import SHARE_OF_MEMORY, Size, choose_size
from isoflop.check.work import image_tokens
from isoflop.cli.check import render_run, run_json
from isoflop.cli.outputs.runs import RunCheck as RunOutput
from isoflop.count import Workload, params
from isoflop.count.operators import Core
from isoflop.errors import Infeasible, InputError
from isoflop.hardware.profile import Profile
from isoflop.model import build
from isoflop.model.support import check_supported
from isoflop.plan.attention_kernel import (
    FEW_SCORES,
    FEWEST_SCORES,
    STANDS_IN,
    attention_kernel,
    scores_kept,
)
from isoflop.plan.cost import step_cost, untimed
from isoflop.plan.memory.peak import moments, peak_memory
from isoflop.quantity import leaf, number
from test_cost import synthetic

SMALL = llama("small", d_model=32, n_layers=2, n_heads=2, d_ff=64, vocab_size=64, max_seq_len=512)
PUBLISHED = [entry for entry in zoo.names() if params(zoo.entry(entry).arch).value > 3e7]


def kinds(arch: Arch) -> dict[str, set[str]]:
    stacks = {"layers": arch.layers}
    if arch.encoder is not None:
        stacks["encoder"] = arch.encoder.layers
    if arch.vision is not None:
        stacks["vision"] = arch.vision.layers
    return {place: {layer.name for layer in layers} for place, layers in stacks.items()}


def what_kernels_see(arch: Arch) -> list[object]:
    """What of attention and experts decides which kernels run, and how large a head is."""
    seen: list[object] = []
    for layer in arch.kinds.values():
        spec, fed = layer.attention, layer.feed_forward
        if isinstance(spec, Attention):
            shape = (spec.d_head, spec.span, spec.position, spec.logit_softcap, spec.sinks)
            seen.append((shape, spec.n_kv_heads == 1 or spec.n_heads // spec.n_kv_heads))
        else:
            seen.append((spec.d_head_nope, spec.d_head_rope, spec.d_head_value))
        seen.append((fed.n_active, fed.n_groups) if isinstance(fed, Experts) else fed.activation)
    return seen


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_named_model_is_cut_down_to_one_that_is_built(name: str) -> None:
    whole = zoo.entry(name).arch
    cut = cut_down(whole, lambda arch: params(arch).value <= 3e7)
    assert params(cut).value <= 3e7
    check_supported(cut)
    assert kinds(cut) == kinds(whole)
    there, here = what_kernels_see(whole), what_kernels_see(cut)
    if all(x.attention.kind == "latent_attention" or x.attention.n_kv_heads > 1
           for x in cut.kinds.values()):  # fmt: skip
        assert here == there
    assert changes(whole, cut)
    assert all(change.cut < change.whole for change in changes(whole, cut))


def test_layers_go_first_then_experts_then_tokens_then_widths() -> None:
    whole = zoo.entry("deepseek-v3").arch
    tried: list[Arch] = []

    def fits(arch: Arch) -> bool:
        tried.append(arch)
        return params(arch).value <= 1e8

    cut_down(whole, fits)
    order = [arch for arch in tried if arch.n_layers == len(whole.kinds)]
    assert {arch.d_model for arch in tried if arch.vocab_size == whole.vocab_size} == {
        whole.d_model
    }
    experts = [arch.kinds["moe"].feed_forward.n_experts for arch in order]
    assert experts == sorted(experts, reverse=True)
    assert experts[-1] == 2 * 8  # twice those that work on a token
    assert order[-1].d_model < whole.d_model


def test_a_model_that_fits_is_not_cut_and_one_that_never_fits_is_refused() -> None:
    assert cut_down(SMALL, lambda _: True) == SMALL
    assert changes(SMALL, SMALL) == ()
    with pytest.raises(Infeasible, match="however far"):
        cut_down(SMALL, lambda _: False)


def test_what_behind_the_projector_never_runs_stays_so_in_a_cut_tower() -> None:
    whole = zoo.entry("llava-1.5-7b").arch
    cut = cut_down(whole, lambda arch: params(arch).value <= 1e8)
    for tower in (whole.vision, cut.vision):
        assert tower is not None
        assert len(tower.layers) - tower.n_run == 1


def test_a_small_model_runs_at_the_usual_size_and_what_was_asked_for_is_held() -> None:
    profile = synthetic()
    assert choose_size(SMALL, None, None, profile) == Size(SMALL, 8, 128, ("batch", "seq_len"))
    assert choose_size(SMALL, 3, None, profile) == Size(SMALL, 3, 128, ("seq_len",))
    assert choose_size(SMALL, None, 77, profile) == Size(SMALL, 8, 77, ("batch",))
    assert choose_size(SMALL, 3, 77, profile) == Size(SMALL, 3, 77)


def room_for(arch: Arch, batch: int, seq_len: int) -> Profile:
    """A machine that just holds one size."""
    needed = float(peak_memory(arch, Workload.train(batch, seq_len), synthetic()).value)
    return synthetic(bytes_memory=int(needed / SHARE_OF_MEMORY) + 1)


@pytest.mark.parametrize(("batch", "seq_len"), [(4, 128), (1, 128), (1, 32)])
def test_the_largest_size_that_fits_is_chosen(batch: int, seq_len: int) -> None:
    size = choose_size(SMALL, None, None, room_for(SMALL, batch, seq_len))
    assert (size.batch, size.seq_len, size.cut) == (batch, seq_len, ())


def test_what_was_asked_for_and_does_not_fit_is_refused_with_a_hint() -> None:
    profile = room_for(SMALL, 4, 128)
    for batch, seq_len in ((64, 128), (64, None), (None, 512)):
        if batch is None:
            assert choose_size(SMALL, batch, seq_len, profile).seq_len == 512
            continue
        with pytest.raises(Infeasible, match="leave out --batch and --seq-len"):
            choose_size(SMALL, batch, 512 if seq_len is None else seq_len, profile)


def test_a_model_that_fits_at_no_size_is_cut_down_and_says_so() -> None:
    large = llama("large", d_model=512, n_layers=9, n_heads=8, d_ff=1024, vocab_size=20_000,
                  max_seq_len=512)  # fmt: skip
    size = choose_size(large, None, None, synthetic(bytes_memory=100_000_000))
    found = {change.field: (change.whole, change.cut) for change in size.cut}
    assert found["layers"][0] == 9
    assert found["layers"][1] == size.arch.n_layers
    assert found["vocab_size"] == (20_000, size.arch.vocab_size)
    assert size.chosen == ("batch", "seq_len")
    with pytest.raises(Infeasible):
        choose_size(large, 1, 128, synthetic(bytes_memory=100_000_000))


def test_a_slow_model_is_cut_down_unless_its_size_was_asked_for() -> None:
    from isoflop.check import size as sizes

    slow = llama("slow", d_model=256, n_layers=12, n_heads=8, d_ff=1024, vocab_size=512,
                 max_seq_len=512)  # fmt: skip
    profile = synthetic()
    seconds = float(step_cost(slow, Workload.train(1, 32), profile).value)
    patch = pytest.MonkeyPatch()
    with patch.context() as changed:
        changed.setattr(sizes, "SECONDS_STEP", seconds / 2)
        assert choose_size(slow, None, None, profile).arch.n_layers < 12
        assert choose_size(slow, 8, 128, profile) == Size(slow, 8, 128)
        assert choose_size(slow, 8, None, profile) == Size(slow, 8, 32, ("seq_len",))


def test_an_image_is_among_the_tokens() -> None:
    llava = cut_down(zoo.entry("llava-1.5-7b").arch, lambda arch: params(arch).value <= 3e7)
    assert image_tokens(llava) == 24 * 24
    assert choose_size(llava, 1, None, synthetic()).seq_len - 24 * 24 in (32, 64, 128)
    with pytest.raises(InputError, match="577"):
        choose_size(llava, 1, 576, synthetic())
    with pytest.raises(InputError, match="longest context"):
        choose_size(llava, 1, 10**6, synthetic())


@pytest.mark.parametrize("name", ["t5-small", "llava-1.5-7b"])
def test_towers_are_priced_and_what_never_runs_is_not_trained(name: str) -> None:
    arch = cut_down(zoo.entry(name).arch, lambda a: params(a).value <= 3e7)
    work = Workload.train(1, 32 + image_tokens(arch))
    tree = step_cost(arch, work, synthetic())
    unread = params(arch).find("vision/unread").value if arch.vision else 0
    # The synthetic optimizer takes a nanosecond for each number.
    trained = float(tree.find("optimizer").value) * 1e9
    assert trained == pytest.approx(float(params(arch).value - unread))
    place = "vision" if arch.vision else "encoder"
    assert tree.find(f"forward/{place}/layer/attention/core").value > 0
    assert float(peak_memory(arch, work, synthetic()).value) > 4 * 3 * trained
    held = {"weights": 0, "moments": 0, "gradients": 0}
    for block in moments(arch, work)["end of backward"]:
        held[block.name] = held.get(block.name, 0) + block.total.value
    assert held["weights"] == 4 * params(arch).value
    assert held["moments"] == 8 * (params(arch).value - unread)
    assert held["gradients"] == 4 * (params(arch).value - unread)


def test_a_t5_pays_for_its_encoder_its_crossing_and_its_dropout() -> None:
    arch = t5("t", d_model=8, n_layers=2, n_heads=2, d_head=4, d_ff=16, vocab_size=16,
              max_seq_len=32)  # fmt: skip
    tree = step_cost(arch, Workload.train(2, 4), synthetic())
    seconds = {
        path: float(tree.find(f"forward/{path}").value) * 1e9
        for path in ("encoder/layer/attention/core", "layer/attention/core", "layer/cross/core")
    }
    pairs = 2 * 2 * 4 * 4
    dropped = pairs if arch.layers[0].attention.dropout else 0  # type: ignore[union-attr]
    # 4 heads of 2 sequences, 4 tokens, heads of 4, none shared; dropout by the pair.
    assert seconds == dict.fromkeys(seconds, pytest.approx(4 * 4 * 4 + dropped))
    # Two readers of one table: its dense gradients are made and added up.
    table = 16 * 8
    gather = (2 * 4) * 8 * 16
    assert float(tree.find("backward/encoder/tokens").value) * 1e9 == pytest.approx(gather + table)


def cases() -> dict[str, dict[str, object]]:
    return {
        "plain": {},
        "window": {"span": Window(8)},
        "alibi": {"position": Alibi()},
        "bias": {"position": RelativeBias()},
        "softcap": {"logit_softcap": 30.0},
        "sinks": {"sinks": True},
        "dropout": {"dropout": 0.1},
    }


def core_of(n_tokens: int, case: str) -> Core:
    spec = replace(Attention(n_heads=2, n_kv_heads=2, d_head=8), **cases()[case])
    arch = replace(SMALL, layers=(replace(SMALL.layers[0], attention=spec),))
    from isoflop.count.blocks import describe

    layer = next(p for p in describe(arch, Workload.train(1, n_tokens)).parts if p.name == "layer")
    block = next(p for p in layer.parts if p.name == "attention")
    found = next(p.operator for p in block.parts if p.name == "core")
    assert isinstance(found, Core)
    return found


def told(case: str, n_tokens: int) -> dict[str, object]:
    given: dict[str, dict[str, object]] = {
        "plain": {},
        "window": {"window": 8},
        "alibi": {"alibi": torch.ones(2)},
        "bias": {"bias": torch.zeros(1, 2, n_tokens, n_tokens, requires_grad=True)},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": torch.zeros(2, requires_grad=True)},
        "dropout": {"dropout_p": 0.1},
    }
    return given[case]


@pytest.mark.parametrize("n_tokens", [64, 320, 576])
@pytest.mark.parametrize("case", cases())
def test_what_waits_of_scores_is_what_autograd_keeps(case: str, n_tokens: int) -> None:
    """Oracle: the storages that autograd saves, in tensors of all pairs."""
    q, k, v = (torch.randn(1, n_tokens, 2, 8, requires_grad=True) for _ in range(3))
    given = told(case, n_tokens)
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attention(q, k, v, causal=True, **given)  # type: ignore[call-overload]
    assert out.requires_grad
    bias = given.get("bias")
    if isinstance(bias, torch.Tensor):  # it waits in any case, under its own path
        held.pop(bias.untyped_storage().data_ptr(), None)
    pairs = 2 * n_tokens**2 * 4
    assert sum(size >= pairs for size in held.values()) == scores_kept(core_of(n_tokens, case))


@pytest.mark.parametrize("case", cases())
def test_the_kernel_named_is_of_the_backend_that_runs(case: str) -> None:
    n_tokens = 64
    x = torch.ones(1, n_tokens, 2, 8, requires_grad=True)
    taken = explain_dispatch(x, x, x, causal=True, **told(case, n_tokens)).backend
    own = attention_kernel(core_of(n_tokens, case)) == "attention_own"
    assert taken == ("reference" if own else "sdpa")


def test_the_limits_are_those_of_the_dispatch() -> None:
    assert (FEW_SCORES, FEWEST_SCORES) == (choice.FEW_SCORES, choice.FEWEST_SCORES)


def test_values_of_another_width_have_no_fused_kernel() -> None:
    core = core_of(16, "plain")
    assert attention_kernel(core) == "attention"
    latent = replace(core, d_key=number(12))
    assert attention_kernel(latent) == "attention_scores"
    assert scores_kept(latent) == 1


def test_a_profile_of_an_earlier_version_still_prices_and_says_what_it_lacks() -> None:
    profile, work = synthetic(), Workload.train(1, 16)
    old = replace(
        profile,
        curves={
            name: curve
            for name, curve in profile.curves.items()
            if name.removesuffix("_forward").removesuffix("_backward") not in STANDS_IN
        },
    )
    dropping = gpt("d", d_model=8, n_layers=1, n_heads=2, vocab_size=16, max_seq_len=16)
    layer = dropping.layers[0]
    capped = replace(layer.attention, logit_softcap=5.0)
    dropping = replace(dropping, layers=(replace(layer, attention=capped, dropout=0.1),))
    assert untimed(dropping, work, profile) == ()
    assert untimed(dropping, work, old) == ("attention_own", "dropout")
    assert step_cost(dropping, work, old).value < step_cost(dropping, work, profile).value


def test_the_loss_of_an_encoder_decoder_is_that_of_its_logits() -> None:
    """Oracle: PyTorch's cross entropy over the logits, in float64, with its gradients."""
    arch = t5("t", d_model=8, n_layers=1, n_heads=2, d_head=4, d_ff=16, vocab_size=13,
              max_seq_len=32)  # fmt: skip
    model = build(arch, dtype=torch.float64).eval()
    source, tokens, targets = (torch.randint(13, (2, n)) for n in (7, 5, 5))
    targets[0, 0] = -100
    logits = model(source, tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = model.loss(source, tokens, targets)
    assert torch.allclose(found, expected)
    grads = torch.autograd.grad(found, list(model.parameters()))
    for mine, theirs in zip(grads, wanted, strict=True):
        assert torch.allclose(mine, theirs)


def a_run() -> RunCheck:
    line, tree = Line(1.0, 2.0), leaf("x", "seconds", 1)
    from isoflop.check.measure import Measured

    measured = Measured((2.0,), 2.0, 10, 5, "VmHWM", {}, {})
    run = {"seconds_step": line, "bytes_peak": line}
    return RunCheck(run, {"forward/head": line}, 1.0, tree, tree, measured, ("dropout",))


def test_a_cut_model_is_never_shown_as_if_it_were_the_whole() -> None:
    whole = zoo.entry("deepseek-v3").arch
    cut = cut_down(whole, lambda arch: params(arch).value <= 1e8)
    size = Size(cut, 1, 128, ("batch", "seq_len"), changes(whole, cut))
    text = render_run(size, a_run())
    assert "deepseek-v3 CUT DOWN, 1 x 128 tokens (batch and length chosen)" in text
    assert "layers 61 to 2" in text
    assert f"d_model 7,168 to {cut.d_model:,}" in text
    assert "lacks dropout: too little is predicted" in text
    data = json.loads(json.dumps(run_json(size, a_run())))
    RunOutput.model_validate(data["run"], strict=True)
    fields = {change["field"]: change for change in data["run"]["cut"]}
    assert fields["layers"] == {"field": "layers", "whole": 61, "cut": 2}
    assert fields["layers.moe.feed_forward.n_experts"]["whole"] == 256


def test_a_whole_model_is_shown_without_a_word_of_cutting() -> None:
    text = render_run(Size(SMALL, 2, 16), a_run())
    assert "small, 2 x 16 tokens, in a process" in text
    assert "cut" not in text.lower().replace("executed", "")
