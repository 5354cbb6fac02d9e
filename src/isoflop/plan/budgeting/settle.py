"""From a budget to a model: how large, on how much data, in how long, at what risk.

Money buys accelerator-hours; a plan of the model at hand says what tokens an hour trains, in the
quickest layout and with what failures and checkpoints leave of it (training/plan.py); a law says what size
makes the best of it; and the size changes what an hour trains. The loop is run until the
size stays; then, since hours train more FLOPs of some sizes than of others, neighbours are
tried as long as the loss falls, and half and double the size. Everything derived comes from the exact count of a concrete spec, not from the
round number that the law asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from isoflop.arch import Arch
from isoflop.count import params
from isoflop.count.params import CONVENTIONS
from isoflop.count.shape import shape
from isoflop.errors import Infeasible, InputError
from isoflop.laws import Spread, spread_of
from isoflop.laws.form import FLOPS_PER_PARAM_TOKEN
from isoflop.plan.budgeting.plan import Ask, BudgetPlan, Choice, Refused
from isoflop.plan.goodput import NeverEnds, Trouble
from isoflop.plan.training.ask import TrainAsk
from isoflop.plan.training.plan import TrainPlan, planned, what_if
from isoflop.plan.training.work import Work, sequences_per_step
from isoflop.quantity import Interval

#: Share of the peak that the first guess of a model's size supposes; the loop forgets it.
FIRST_UTILIZATION = 0.4
#: Rounds of the loop; it ends far earlier, when a size comes again.
MOST_ROUNDS = 16
#: From one size to the next that is tried around the loop's.
STEP = 1.2
#: How often the size is halved in search of one that fits.
MOST_HALVINGS = 12


def plan_budget(ask: Ask) -> BudgetPlan:
    """The model that a budget is best spent on, and the plan of its run.

    Raises:
        InputError: no spec of that size, or a plan that is refused.
        Infeasible: the best size does not fit the cluster; what does is in the message.

    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.laws import find_law
    >>> ask = Ask("flops", 1e21, parse_cluster("64xh100-sxm"), find_law("besiroglu-2024"))
    >>> plan = plan_budget(ask)
    >>> round(plan.chosen.n_params / 1e9, 1), round(plan.chosen.loss, 1)
    (2.8, 2.3)
    """
    best, half, double = _between(ask, _settle(ask))
    chosen, spread = _exactly(best), spread_of(ask.law)
    return BudgetPlan(
        ask=ask,
        chosen=chosen,
        half=half,
        double=double,
        loss_interval=_loss_interval(spread, ask, chosen),
        params_interval=_params_interval(spread, ask, chosen),
        extrapolation=None if spread is None else chosen.flops / spread.flops_largest,
    )


def _between(ask: Ask, best: Choice) -> tuple[Choice, Choice | Refused, Choice | Refused]:
    """The best size, half of it and twice it, neither of which is better.

    Between sizes whose layouts differ the loss can have a second bottom.
    """
    half, double = (_try(ask, best.n_params * f, best.tokens / f) for f in (0.5, 2))
    better = [c for c in (half, double) if isinstance(c, Choice) and c.loss < best.loss]
    if not better:
        return best, half, double
    return _between(ask, _around(ask, min(better, key=lambda c: c.loss)))


def _loss_interval(spread: Spread | None, ask: Ask, chosen: Choice) -> Interval | None:
    if spread is None:
        return None
    n, d = chosen.n_law, chosen.tokens
    return spread.interval_of_run(lambda law: ask.demand.loss(law, n, d))


def _params_interval(spread: Spread | None, ask: Ask, chosen: Choice) -> Interval | None:
    if spread is None:
        return None
    middle = ask.demand.optimum(ask.law, chosen.flops).params
    return spread.interval(
        lambda law: ask.demand.optimum(law, chosen.flops).params / middle * chosen.n_params
    )


# --- the loop ---------------------------------------------------------------------------------


def _settle(ask: Ask) -> Choice:
    """The size with the lowest loss, from where the law and the plan agree."""
    seen: dict[int, Choice] = {}
    guess = ask.demand.optimum(ask.law, _first_flops(ask))
    n_params, tokens = guess.params, guess.tokens
    for _ in range(MOST_ROUNDS):
        choice = _fitting(ask, n_params, tokens)
        if choice.n_params in seen:
            break
        seen[choice.n_params] = choice
        wanted = ask.demand.optimum(ask.law, choice.flops).params
        n_params, tokens = wanted * choice.n_params / choice.n_law, choice.tokens
    best = min(seen.values(), key=lambda c: c.loss)
    return _around(ask, best)


def _around(ask: Ask, best: Choice) -> Choice:
    """The best of the sizes in steps to both sides, as far as the loss falls."""
    return _climb(ask, _climb(ask, best, STEP), 1 / STEP)


def _climb(ask: Ask, best: Choice, factor: float) -> Choice:
    """The last of ever larger (or smaller) sizes that lowers the loss."""
    while True:
        other = _try(ask, best.n_params * factor, best.tokens / factor)
        if isinstance(other, Refused) or other.loss >= best.loss:
            return best
        best = other


def _first_flops(ask: Ask) -> float:
    hours, chip = ask.hours, ask.cluster.chip
    if hours is None:
        return ask.amount
    return 3600 * hours * float(chip.peak(ask.precision).value) * FIRST_UTILIZATION


def _exactly(choice: Choice) -> Choice:
    """The choice with the run of just its tokens, in its layout; about as many were planned."""
    return replace(choice, run=what_if(choice.run, tokens=choice.tokens))


def _try(ask: Ask, n_params: float, tokens: float) -> Choice | Refused:
    """Another size, or why not."""
    try:
        return _choice(ask, n_params, tokens)
    except (Infeasible, InputError) as error:
        return Refused(n_params, str(error).splitlines()[0])


def _fitting(ask: Ask, n_params: float, tokens: float) -> Choice:
    """The choice of a size; where it cannot be had, say which can."""
    try:
        return _choice(ask, n_params, tokens)
    except NeverEnds:
        raise
    except Infeasible as error:
        help_ = "; ".join(_helps(ask, n_params, tokens))
        raise Infeasible(f"{error}\nwhat would help: {help_}") from None


def _helps(ask: Ask, n_params: float, tokens: float) -> Iterator[str]:
    yield "more accelerators, or ones with more memory"
    smaller = (_try(ask, n_params / 2**k, tokens) for k in range(1, MOST_HALVINGS + 1))
    fits = next((choice for choice in smaller if isinstance(choice, Choice)), None)
    if fits is not None:
        yield f"a smaller model: {fits.n_params:,} parameters fit, at a loss of {fits.loss:.3f}"


def _choice(ask: Ask, n_params: float, tokens: float) -> Choice:
    """About `n_params` parameters under the budget; `tokens` is about how many it will see.

    Raises:
        Infeasible: it does not fit, or serving takes the whole budget.
    """
    arch = shape(n_params, family=ask.family, vocab_size=ask.vocab_size, max_seq_len=ask.seq_len)
    tree = params(arch)
    count = int(tree.value)
    convention = CONVENTIONS.get(ask.law.params_convention, CONVENTIONS["total"])
    batch = ask.global_batch or sequences_per_step(tokens, ask.seq_len, ask.cluster.count)
    run = _plan(ask, arch, max(1, int(tokens)), batch)
    flops = _flops(ask, count, run)
    trained = int(ask.demand.tokens(count, flops))
    if trained < 1:
        raise Infeasible(f"{arch.name}: serving takes the whole budget, nothing is left to train")
    n_law = float(convention.count(tree).value)
    loss = ask.demand.loss(ask.law, n_law, trained)
    return Choice(arch, count, n_law, trained, loss, flops, run)


def _flops(ask: Ask, n_params: int, run: TrainPlan) -> float:
    """What the budget comes to at the rate of `run`, 6 per parameter and token."""
    hours = ask.hours
    if hours is None:
        return ask.amount
    per_token = 24 * float(run.days.value) * ask.cluster.count / run.ask.work.tokens
    return FLOPS_PER_PARAM_TOKEN * n_params * hours / per_token


def _plan(ask: Ask, arch: Arch, tokens: int, batch: int) -> TrainPlan:
    """The one place where a budget asks for a run's time, memory and energy."""
    work = Work(arch, tokens, ask.seq_len, recompute=ask.recompute or "none")
    return planned(TrainAsk(
        work, ask.cluster, batch, ask.precision, mfu=ask.mfu, tflops=ask.tflops, price=ask.price,
        watts=ask.watts, pue=ask.pue, carbon=ask.carbon, stack=ask.stack, beliefs=ask.beliefs,
        trouble=Trouble(ask.mtbf_hours, ask.seconds_restart, ask.overrun), may_recompute=ask.recompute is None,
    ))  # fmt: skip
