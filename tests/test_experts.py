"""Mixtures of experts: routing, dispatch, balance, counts; oracles go token by token."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from isoflop.arch import Arch, Dense, Experts, llama
from isoflop.arch.families import deepseek, gpt_oss, mixtral, qwen2_moe, qwen3_moe
from isoflop.arch.spec import Embedding, Head, LayerNorm, RmsNorm
from isoflop.arch.zoo import entry
from isoflop.check.agree import agree
from isoflop.check.paths import tree_path
from isoflop.check.row import leaf_values
from isoflop.check.work import count_flops
from isoflop.count import Workload, flops_forward
from isoflop.errors import InputError, UnknownName
from isoflop.model import build
from isoflop.model.experts import (
    Capacity,
    Dropless,
    ExpertsModule,
    RoundRobin,
    Routing,
    correct_scores,
    load_balancing_loss,
    record_routing,
    router_z_loss,
    set_dispatch,
)
from isoflop.model.experts import module as experts_module
from isoflop.model.experts.dispatch import make_plan
from isoflop.model.experts.grouped import grouped_linear, grouped_outer
from isoflop.model.parts import FeedForwardModule

V, T_MAX, D = 50, 24, 8

PLAIN = llama(
    "plain", d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=V,
    max_seq_len=T_MAX,
)  # fmt: skip
EXPERT = Dense(12, "silu", gated=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_experts(experts: Experts, arch: Arch = PLAIN) -> Arch:
    layer = replace(arch.layers[0], feed_forward=experts)
    return replace(arch, layers=(layer,) * arch.n_layers)


def lively(module: torch.nn.Module, seed: int = 4) -> torch.nn.Module:
    """Values that make every part show."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in [*module.parameters(), *module.buffers()]:
            weight.copy_(torch.randn(weight.shape, generator=stream) * 0.5)
    return module


def some_tokens(length: int = 12, batch: int = 2) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(2))


def some_vectors(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- what a mixture computes ------------------------------------------------------------------


@st.composite
def mixtures(draw: st.DrawFn) -> Experts:
    """Any small mixture that can be built."""
    activation = draw(st.sampled_from(["silu", "gelu", "relu_squared", "silu_clamped"]))
    gated = activation == "silu_clamped" or draw(st.booleans())
    bias = draw(st.booleans())
    n_groups = draw(st.integers(1, 3))
    n_experts = n_groups * draw(st.integers(1, 3))
    n_active_groups = draw(st.integers(1, n_groups))
    shared = draw(st.sampled_from([None, Dense(5, "silu", gated=True)]))
    return Experts(
        n_experts,
        draw(st.integers(1, n_active_groups * n_experts // n_groups)),
        Dense(draw(st.sampled_from([3, 4, 6])), activation, gated=gated, bias=bias),
        shared,
        shared_gate=shared is not None and draw(st.booleans()),
        router_bias=draw(st.booleans()),
        score_correction=draw(st.booleans()),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        n_groups=n_groups,
        n_active_groups=n_active_groups,
    )


def feed(dense: Dense, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One feed-forward on one token, from its definition."""

    def linear(name: str, of: torch.Tensor) -> torch.Tensor:
        return weights[f"{name}.weight"] @ of + weights.get(f"{name}.bias", 0.0)

    up = linear("up", x)
    if dense.activation == "silu_clamped":
        gate = linear("gate", x).clamp(max=7)
        return linear("down", (up.clamp(-7, 7) + 1) * gate / (1 + torch.exp(-1.702 * gate)))
    acts = {
        "silu": lambda a: a / (1 + torch.exp(-a)),
        "gelu": lambda a: a * 0.5 * (1 + torch.erf(a / math.sqrt(2))),
        "relu_squared": lambda a: torch.where(a > 0, a * a, 0.0 * a),
    }
    act = acts[dense.activation]
    return linear("down", act(linear("gate", x)) * up if dense.gated else act(up))


def chosen(spec: Experts, corrected: list[float]) -> list[int]:
    """The best experts of the best groups, by sorting."""
    size = spec.n_experts // spec.n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(spec.n_groups)]
    best = 2 if spec.score_correction else 1
    worth = [sum(sorted((corrected[e] for e in g), reverse=True)[:best]) for g in groups]
    order = sorted(range(spec.n_groups), key=lambda g: -worth[g])[: spec.n_active_groups]
    allowed = [e for g in order for e in groups[g]]
    return sorted(allowed, key=lambda e: -corrected[e])[: spec.n_active]


def token_by_token(spec: Experts, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A mixture on one token: every expert is computed, gates of those not chosen are 0."""
    logits = w["router.weight"] @ x + w.get("router.bias", 0.0)
    softmax = spec.score == "softmax"
    scores = logits.exp() / logits.exp().sum() if softmax else 1 / (1 + (-logits).exp())
    active = chosen(spec, (scores + w.get("router.correction", 0.0)).tolist())
    gates = torch.zeros_like(scores)
    gates[active] = scores[active] / (scores[active].sum() if spec.normalize else 1.0)
    y = torch.zeros_like(x)
    for e in range(spec.n_experts):
        own = {n.removeprefix("experts."): v[e] for n, v in w.items() if n.startswith("experts.")}
        y = y + spec.scale * gates[e] * feed(spec.expert, own, x)
    if spec.shared is not None:
        own = {n.removeprefix("shared."): v for n, v in w.items() if n.startswith("shared.")}
        heard = torch.sigmoid(w["shared_gate.weight"][0] @ x) if spec.shared_gate else 1.0
        y = y + heard * feed(spec.shared, own, x)
    return y


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(1, 6))
def test_a_mixture_and_its_gradients_are_the_sum_over_all_experts(spec, n_tokens):
    module = lively(ExpertsModule(spec, D).double())
    x = some_vectors(2, n_tokens, D).requires_grad_()
    inputs = [x, *module.parameters()]
    w = dict(module.named_parameters()) | dict(module.named_buffers())
    expected = torch.stack([token_by_token(spec, w, row) for row in x.flatten(0, 1)]).view_as(x)
    got = module(x)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
    slopes = [
        torch.autograd.grad((y * some_vectors(*y.shape, seed=9)).sum(), inputs, allow_unused=True)
        for y in (got, expected)
    ]
    for slope, definition in zip(*slopes, strict=True):
        if slope is None or definition is None:  # a gate of 1 whatever its score has none
            assert not any(g is not None and g.abs().max() > 1e-8 for g in (slope, definition))
        else:
            assert torch.allclose(slope, definition, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_for_every_token_is_the_dense_feed_forward(score):
    expert = replace(EXPERT, bias=True)
    module = lively(ExpertsModule(Experts(1, 1, expert, score=score), D).double())
    dense = FeedForwardModule(expert, D).double()
    dense.load_state_dict(
        {n.removeprefix("experts."): w[0] for n, w in module.state_dict().items() if "experts" in n}
    )
    x = some_vectors(2, 5, D)
    assert torch.allclose(module(x), dense(x), rtol=1e-12)


def test_experts_drop_out_in_training_alone():
    module = lively(ExpertsModule(Experts(4, 2, replace(EXPERT, dropout=0.5)), D).double())
    x = some_vectors(2, 5, D)
    expected = module.eval()(x)
    assert torch.equal(module(x), expected)
    assert not torch.allclose(module.train()(x), expected)


# --- capacity ---------------------------------------------------------------------------------


def routing_of(module: ExpertsModule, x: torch.Tensor) -> Routing:
    return module.router(x)


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(1, 9), st.sampled_from(["position", "probability"]))
def test_room_for_every_token_drops_nothing(spec, n_tokens, first):
    module = lively(ExpertsModule(spec, D).double())
    x = some_vectors(2, n_tokens, D)
    expected = module(x)
    module.dispatch = Capacity(spec.n_experts / spec.n_active, first)
    assert torch.allclose(module(x), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from([0.3, 0.5, 1.0, 1.1, 1.5]),
    st.sampled_from(["position", "probability"]),
    st.integers(0, 99),
)
def test_exactly_the_choices_beyond_the_room_are_dropped(e, k, n_tokens, factor, first, seed):
    k = min(k, e)
    scores = some_vectors(1, n_tokens, e, seed=seed).softmax(-1)
    gates, choice = scores.topk(k)
    routing = Routing(scores.log(), scores, choice, gates)
    plan = make_plan(Capacity(factor, first), routing)
    served = plan.choices[plan.kept].tolist()
    queue = [(rank, t) for rank in range(k) for t in range(n_tokens)]
    if first == "probability":
        queue.sort(key=lambda place: -float(gates[0, place[1], place[0]]))
    room = -(-round(factor * 10) * n_tokens * k // (10 * e))
    load: Counter[int] = Counter()
    expected = set()
    for rank, t in queue:
        expert = int(choice[0, t, rank])
        load[expert] += 1
        if load[expert] <= room:
            expected.add(t * k + rank)
    assert len(served) == len(set(served))
    assert set(served) == expected
    assert plan.ends.tolist() == [room * (i + 1) for i in range(e)]
    for row, (place, kept) in enumerate(zip(plan.choices.tolist(), plan.kept, strict=True)):
        assert not kept or int(choice.flatten()[place]) == row // room


def test_a_dropped_choice_adds_nothing_and_the_other_gates_stay():
    spec = Experts(3, 2, EXPERT)
    module = lively(ExpertsModule(spec, D).double())
    x = some_vectors(1, 9, D)
    routing = module.router(x)
    plan = make_plan(Capacity(0.6), routing)
    served = set(plan.choices[plan.kept].tolist())
    assert 0 < len(served) < 18
    expected = torch.zeros(9, D, dtype=torch.float64)
    w = module.state_dict()
    for t in range(9):
        for rank in range(2):
            if 2 * t + rank in served:
                e = int(routing.experts[0, t, rank])
                own = {
                    n.removeprefix("experts."): v[e]
                    for n, v in w.items()
                    if n.startswith("experts.")
                }
                expected[t] += routing.gates[0, t, rank] * feed(EXPERT, own, x[0, t])
    module.dispatch = Capacity(0.6)
    assert torch.allclose(module(x)[0], expected)


def test_a_capacity_that_is_none_is_refused_with_all_its_problems():
    with pytest.raises(InputError) as caught:
        Capacity(0.0, "last")  # type: ignore[arg-type]
    assert {problem.field for problem in caught.value.problems} == {"factor", "first"}


# --- forced balance ---------------------------------------------------------------------------


@pytest.mark.parametrize(("e", "k", "n_tokens"), [(8, 2, 12), (6, 4, 9), (5, 5, 3)])
def test_round_robin_gives_each_expert_the_same_load_and_each_token_different_experts(
    e, k, n_tokens
):
    module = lively(ExpertsModule(Experts(e, k, EXPERT), D))
    module.dispatch = RoundRobin()
    with record_routing(module) as routings:
        module(some_vectors(n_tokens, 2, D).float())
    (routing,) = routings.values()
    assert routing.load.tolist() == [2 * n_tokens * k / e] * e
    assert all(len(set(row)) == k for row in routing.experts.flatten(0, 1).tolist())
    assert torch.allclose(routing.gates.sum(-1), torch.ones(n_tokens, 2))


def test_dispatch_is_a_setting_of_the_built_model_and_may_change():
    arch = with_experts(Experts(4, 2, EXPERT))
    tight = lively(build(arch, dispatch=Capacity(0.5)))
    free = lively(build(arch))
    assert not torch.allclose(tight(some_tokens()), free(some_tokens()))
    set_dispatch(tight, Dropless())
    assert torch.equal(tight(some_tokens()), free(some_tokens()))


# --- balance ----------------------------------------------------------------------------------


def routed(scores: torch.Tensor, n_active: int) -> Routing:
    gates, choice = scores.topk(n_active)
    return Routing(scores.log(), scores, choice, gates)


@pytest.mark.parametrize("per", ["batch", "sequence"])
@pytest.mark.parametrize("n_active", [1, 2])
def test_the_balancing_loss_is_one_at_balance_and_more_elsewhere(per, n_active):
    best = torch.arange(24).view(2, 12) % 4
    sure = F.one_hot(best, 4) + F.one_hot((best + 1) % 4, 4) * 0.999
    balanced = load_balancing_loss(routed(sure.double(), n_active), per)
    assert math.isclose(balanced, 1.0, rel_tol=1e-6)
    uneven = sure.double()
    uneven[:, :5] = uneven[0, 0]
    assert load_balancing_loss(routed(uneven, n_active), per) > 1.01


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_sure_choices_cost_the_sum_of_squared_shares(experts):
    scores = F.one_hot(torch.tensor(experts), 5).double()[None]
    shares = [experts.count(e) / len(experts) for e in range(5)]
    loss = load_balancing_loss(routed(scores, 1))
    assert math.isclose(loss, 5 * sum(s * s for s in shares), rel_tol=1e-12)
    assert loss > 1 - 1e-12


def test_a_sequences_loss_is_the_mean_of_each_sequence_alone():
    scores = some_vectors(3, 7, 6).sigmoid()
    alone = [float(load_balancing_loss(routed(row[None], 2))) for row in scores]
    whole = load_balancing_loss(routed(scores, 2), per="sequence")
    assert math.isclose(whole, sum(alone) / 3, rel_tol=1e-12)
    assert not math.isclose(load_balancing_loss(routed(scores, 2)), whole, rel_tol=1e-6)


def test_the_z_loss_is_the_mean_squared_log_of_summed_exponentials():
    logits = some_vectors(2, 5, 4) * 3
    sums = [sum(math.exp(z) for z in row) for row in logits.flatten(0, 1).tolist()]
    expected = sum(math.log(s) ** 2 for s in sums) / 10
    scores = logits.softmax(-1)
    got = router_z_loss(Routing(logits, scores, *reversed(scores.topk(1))))
    assert math.isclose(got, expected, rel_tol=1e-12)


def test_descending_the_balancing_loss_evens_the_load():
    module = lively(ExpertsModule(Experts(6, 2, EXPERT), D))
    x = some_vectors(4, 64, D).float() + 1.0  # a mean that some experts like
    before = module.router(x).load
    step = torch.optim.SGD(module.router.parameters(), lr=0.5)
    for _ in range(60):
        load_balancing_loss(module.router(x)).backward()
        step.step()
        step.zero_grad()
    after = module.router(x).load
    assert before.max() > 1.8 * before.float().mean()
    assert after.max() < 1.25 * after.float().mean()


def test_moving_the_correction_evens_the_load_and_leaves_the_gates_to_the_scores():
    spec = Experts(6, 2, EXPERT, score="sigmoid", score_correction=True, normalize=False)
    arch = with_experts(spec)
    model = lively(build(arch))
    for layer in model.layers:
        layer.feed_forward.router.correction.zero_()
    tokens = some_tokens(24, 16)
    worst = []
    for _ in range(60):
        with torch.no_grad(), record_routing(model) as routings:
            model(tokens)
        loads = {name: routing.load for name, routing in routings.items()}
        worst.append(max(float(load.max() / load.float().mean()) for load in loads.values()))
        correct_scores(model, loads, rate=0.005)
    assert worst[0] > 1.5
    assert max(worst[-20:]) < 1.15
    routing = routings["layers.1.feed_forward.router"]
    assert torch.equal(routing.gates, routing.scores.gather(-1, routing.experts))


def test_one_move_is_the_rate_towards_the_mean_load():
    router = ExpertsModule(Experts(3, 1, EXPERT, score_correction=True), D).router
    router.correct(torch.tensor([5, 1, 3]), rate=0.001)
    assert torch.equal(router.correction, torch.tensor([-0.001, 0.001, 0.0]))


def test_a_correction_that_is_not_there_cannot_be_moved():
    model = build(with_experts(Experts(3, 1, EXPERT)))
    with pytest.raises(InputError, match="score_correction"):
        correct_scores(model, {"layers.0.feed_forward.router": torch.ones(3)}, rate=0.1)
    with pytest.raises(UnknownName, match=r"did you mean layers\.0\.feed_forward\.router"):
        correct_scores(model, {"layers.0.feed_forward.rooter": torch.ones(3)}, rate=0.1)


def test_routing_is_recorded_inside_the_context_alone_and_carries_gradients():
    model = lively(build(with_experts(Experts(4, 2, EXPERT))))
    with record_routing(model) as routings:
        model(some_tokens())
    seen = dict(routings)
    model(some_tokens(5))
    assert routings == seen
    assert all(layer.feed_forward.router.last is None for layer in model.layers)  # nothing is held
    assert list(seen) == [f"layers.{i}.feed_forward.router" for i in range(2)]
    assert all(x.experts.shape == (2, 12, 2) and x.load.sum() == 48 for x in seen.values())
    sum(load_balancing_loss(x) + router_z_loss(x) for x in seen.values()).backward()
    assert all(layer.feed_forward.router.weight.grad.abs().sum() > 0 for layer in model.layers)


# --- products of groups -----------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.sampled_from([3, 8]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_each_group_of_rows_meets_its_own_matrix(sizes, width, dtype):
    x, w = some_vectors(sum(sizes), width), some_vectors(len(sizes), 16, width, seed=1)
    y = some_vectors(sum(sizes), 16, seed=2)
    ends = torch.tensor(sizes).cumsum(0).int()
    cut = [list(t.to(dtype).double().split(sizes)) for t in (x, y)]
    expected = torch.cat([a @ b.T for a, b in zip(cut[0], w.to(dtype).double(), strict=True)])
    outer = torch.stack([b.T @ a for a, b in zip(*cut, strict=True)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float64: 1e-12}[dtype]
    got = grouped_linear(x.to(dtype), w.to(dtype), ends)
    assert torch.allclose(got.double(), expected, rtol=tolerance, atol=10 * tolerance)
    got = grouped_outer(y.to(dtype), x.to(dtype), ends)
    assert torch.allclose(got.double(), outer, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("width", [3, 8])
def test_the_operators_keep_pytorchs_rules_and_a_summed_gradient_flows(width):
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = some_vectors(5, width).float().requires_grad_()
    w = some_vectors(3, 4, width).float().requires_grad_()
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(grouped_linear, (x, w, ends), test_utils=rules)
    outer = (some_vectors(5, 4).float(), x.detach(), ends)
    torch.library.opcheck(grouped_outer, outer, test_utils=rules)
    grouped_linear(x, w, ends).sum().backward()  # its gradient has strides of 0
    expected = torch.stack([x[a:b].sum(0) for a, b in ((0, 2), (2, 2), (2, 5))])
    assert torch.allclose(w.grad, expected[:, None].expand(3, 4, width), atol=1e-6)


@pytest.mark.parametrize("dispatch", [Dropless(), Capacity(1.25), RoundRobin()])
def test_shapes_depend_on_no_data(dispatch):
    spec = Experts(6, 3, replace(EXPERT, bias=True), EXPERT, score_correction=True, n_groups=2)
    with FakeTensorMode():
        module = ExpertsModule(spec, D)
        module.dispatch = dispatch
        assert module(torch.randn(2, 5, D)).shape == (2, 5, D)


# --- precision --------------------------------------------------------------------------------


def test_routing_stays_in_single_precision_in_half_precision_models_and_under_autocast():
    arch = with_experts(Experts(4, 2, EXPERT, EXPERT, score_correction=True, router_bias=True))
    model = lively(build(arch))
    expected = model.loss(some_tokens(), some_tokens())
    with torch.autocast("cpu", torch.bfloat16), record_routing(model) as cast:
        loss = model.loss(some_tokens(), some_tokens())
    loss.backward()
    assert abs(loss - expected) < 0.05 * expected
    half = build(arch, dtype=torch.bfloat16)
    with record_routing(half) as routings:
        half.loss(some_tokens(), some_tokens()).backward()
    for routing in (*cast.values(), *routings.values()):
        assert routing.logits.dtype == routing.gates.dtype == torch.float32
    router = half.layers[0].feed_forward.router
    assert router.correction.dtype == torch.float32
    correct_scores(half, {"layers.0.feed_forward.router": torch.arange(4)}, rate=0.001)
    assert torch.equal(router.correction.abs(), torch.full((4,), 0.001))


def test_two_backward_passes_give_the_same_bits():
    model = lively(build(with_experts(Experts(6, 3, EXPERT, EXPERT))))
    grads = []
    for _ in range(2):
        model.zero_grad()
        model.loss(some_tokens(), some_tokens()).backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- names, first values, what is refused -----------------------------------------------------


def test_weights_are_named_as_the_count_trees_name_them():
    expert = replace(EXPERT, bias=True)
    spec = Experts(4, 2, expert, Dense(20, "silu", gated=True), shared_gate=True,
                   router_bias=True, score_correction=True)  # fmt: skip
    state = build(with_experts(spec), device="meta").state_dict()
    place = "layers.1.feed_forward."
    shapes = {n.removeprefix(place): tuple(w.shape) for n, w in state.items() if place in n}
    assert shapes == {
        "router.weight": (4, 16),
        "router.bias": (4,),
        "router.correction": (4,),
        "experts.gate.weight": (4, 12, 16),
        "experts.gate.bias": (4, 12),
        "experts.up.weight": (4, 12, 16),
        "experts.up.bias": (4, 12),
        "experts.down.weight": (4, 16, 12),
        "experts.down.bias": (4, 16),
        "shared.gate.weight": (20, 16),
        "shared.up.weight": (20, 16),
        "shared.down.weight": (16, 20),
        "shared_gate.weight": (1, 16),
    }


def test_every_expert_starts_with_deviation_0_02_and_its_output_smaller():
    arch = llama("l", d_model=64, n_layers=8, n_heads=4, n_kv_heads=4, d_ff=96, vocab_size=V,
                 max_seq_len=T_MAX)  # fmt: skip
    spec = Experts(4, 2, Dense(96, "silu", gated=True, bias=True), Dense(96, "silu", gated=True),
                   router_bias=True, score_correction=True)  # fmt: skip
    for name, weight in build(with_experts(spec, arch)).layers[2].feed_forward.state_dict().items():
        if weight.dim() == 1 or name.endswith("bias"):
            assert (weight == 0).all(), name
            continue
        expected = 0.02 / 4 if ".down." in name else 0.02  # sqrt(2 * 8 layers) = 4
        rows = weight if weight.dim() == 3 else weight[None]
        for row in rows:
            assert abs(row.std() / expected - 1) < 0.2, name
        assert weight.dim() < 3 or not torch.equal(weight[0], weight[1])


def test_activations_that_are_not_built_are_refused_by_field():
    spec = Experts(4, 2, Dense(8, "silu_clamped"), Dense(8, "silu_clamped"))
    with pytest.raises(InputError) as caught:
        build(with_experts(spec))
    rules = {problem.field: problem.rule for problem in caught.value.problems}
    built = "is one of relu, gelu, gelu_tanh, gelu_quick, silu, relu_squared where nothing is gated"
    assert rules == {
        "layers.layer.feed_forward.expert.activation": built,
        "layers.layer.feed_forward.shared.activation": built,
    }


def test_a_mixture_that_chooses_more_than_is_open_or_gates_nothing_is_no_spec():
    with pytest.raises(InputError, match="be at most 4, the experts of the active groups"):
        Experts(8, 5, EXPERT, n_groups=4, n_active_groups=2)
    with pytest.raises(InputError, match="shared_gate"):
        Experts(8, 2, EXPERT, shared_gate=True)


# --- counts -----------------------------------------------------------------------------------

SMALL = {
    "d_model": 16, "n_layers": 3, "n_heads": 4, "d_ff": 20, "vocab_size": V, "max_seq_len": T_MAX,
}  # fmt: skip


def plain_attention(arch: Arch) -> Arch:
    """The same feed-forwards around an attention of the plain kind."""
    attention = PLAIN.layers[0].attention
    return replace(
        arch,
        d_model=16,
        layers=tuple(replace(layer, attention=attention) for layer in arch.layers),
        embedding=Embedding(V),
        head=Head(),
        final_norm=RmsNorm(),
    )


SHRUNK = [
    mixtral("mixtral", n_kv_heads=2, n_experts=8, n_active=2, **SMALL),
    qwen2_moe("qwen2", n_kv_heads=2, n_experts=7, n_active=4, d_ff_expert=6, d_ff_shared=10,
              sparse=(True, False, True), **SMALL),
    qwen3_moe("qwen3", n_kv_heads=2, n_experts=9, n_active=5, d_ff_expert=6, **SMALL),
    plain_attention(deepseek("v2", n_experts=12, n_active=3, d_ff_expert=6, n_shared=2, n_dense=1,
                             n_groups=4, n_active_groups=2, **SMALL)),
    plain_attention(deepseek("v3", n_experts=12, n_active=3, d_ff_expert=6, n_shared=1, n_dense=1,
                             n_groups=4, n_active_groups=2, corrected=True, **SMALL)),
    plain_attention(gpt_oss("gpt-oss", n_kv_heads=2, n_experts=6, n_active=4, **SMALL)),
]  # fmt: skip


@pytest.mark.parametrize("arch", SHRUNK, ids=lambda arch: arch.name)
def test_derived_and_built_agree_to_the_last_number(arch):
    rows = agree(arch)
    assert [row for row in rows if not row.agrees] == []
    paths = {row.path.partition("/")[2] for row in rows}
    assert any(path.endswith("feed_forward/experts/down") for path in paths)


def dbrx() -> Arch:
    """132B parameters, 4 of 16 experts (databricks/dbrx-base, config.json)."""
    shape = {"d_model": 6144, "n_layers": 40, "n_heads": 48, "n_kv_heads": 8, "d_ff": 10752,
             "vocab_size": 100352, "max_seq_len": 32768}  # fmt: skip
    plain, norm = llama("dbrx", **shape), LayerNorm(bias=False)
    layer = replace(plain.layers[0], norm=norm)
    experts = Experts(16, 4, layer.feed_forward)
    return with_experts(experts, replace(plain, layers=(layer,) * 40, final_norm=norm))


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen1.5-moe-a2.7b", "dbrx"])
def test_whole_models_agree_to_the_last_number(name):
    rows = agree(dbrx() if name == "dbrx" else entry(name).arch)
    assert [row for row in rows if not row.agrees] == []


def test_products_that_are_really_computed_are_those_that_are_counted(monkeypatch):
    """Real routing on a CPU, uneven, every product an mm of its own that PyTorch counts."""

    def one_by_one(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        rows = x.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ w.T for part, w in zip(rows, weight, strict=True)])

    monkeypatch.setattr(experts_module, "grouped_linear", one_by_one)
    for arch in SHRUNK:
        model = lively(build(arch))
        work = Workload.train(2, 12)
        with record_routing(model) as routings:
            forward, _ = count_flops(model, (some_tokens(), some_tokens()))
        assert any(routing.load.min() < routing.load.max() for routing in routings.values())
        built, derived = Counter(), leaf_values(flops_forward(arch, work))
        for name, flops in forward.items():
            built[tree_path(name, arch)] += flops
        places = [path for path in derived if "feed_forward" in path and derived[path]]
        assert {path: built[path] for path in places} == {path: derived[path] for path in places}
