"""The equivalences that the package rests on, measured on this machine.

Every row compares two independent computations of the same thing and states the bound within which they must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from eotattn.attention import prior_attention
from eotattn.checks import check_device, check_positive_int, require
from eotattn.priors import (
    ClassTokenPrior,
    FourierPrior,
    GridPrior,
    LogPrior,
    RecencyPrior,
    SinkPrior,
    goat_prior,
    grid_positions,
)
from eotattn.provenance import Table
from eotattn.transport import TransportProblem, Tsallis, certify, solve, with_dummy_key

__all__ = ["Equivalence", "EquivalenceReport", "measure_equivalences"]


@dataclass(frozen=True)
class Equivalence:
    """One statement with its measured error.

    Args:
        statement: What equals what.
        error: Largest deviation found, relative to max(1, size).
        bound: Largest admissible deviation.
    """

    statement: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the error is a number within the bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class EquivalenceReport(Table):
    """All statements; prints as a table.

    Args:
        rows: The statements in the order of measurement.
        device: Where they were measured.
    """

    rows: tuple[Equivalence, ...]
    device: str

    @property
    def holds(self) -> bool:
        """Whether every statement holds."""
        return all(row.holds for row in self.rows)

    def to_dict(self) -> dict[str, list[object]]:
        """Columns ``statement``, ``error``, ``bound`` and ``holds``."""
        names = ("statement", "error", "bound")
        columns: dict[str, list[object]] = {name: [asdict(row)[name] for row in self.rows] for name in names}
        return {**columns, "holds": [row.holds for row in self.rows]}

    def __str__(self) -> str:
        width = max(len(row.statement) for row in self.rows)
        lines = [f"{'equivalence':<{width}}  {'error':>8}  {'bound':>8}  holds"]
        for row in self.rows:
            answer = "yes" if row.holds else "NO"
            lines.append(f"{row.statement:<{width}}  {row.error:8.1e}  {row.bound:8.0e}  {answer}")
        count = sum(row.holds for row in self.rows)
        return "\n".join([*lines, f"{count} of {len(self.rows)} hold (torch {torch.__version__}, {self.device})"])


def measure_equivalences(*, seed: int = 0, device: torch.device | str = "cpu") -> EquivalenceReport:
    """Measure every equivalence: transport against POT, attention against transport, lanes against dense, gradients.

    Args:
        seed: Seed of the random problems, from 0 to 2^63 - 1.
        device: Where attention runs; POT always runs on the CPU in float64.

    Returns:
        A report that prints as a table.

    Raises:
        ValueError: For another seed, or if this machine lacks the device.

    Example:
        >>> measure_equivalences().holds
        True
    """
    owner = "measure_equivalences"
    check_positive_int(owner, "seed", seed, minimum=0)
    require(seed < 2**63, owner, "seed", "be below 2^63", seed, "Choose a smaller one")
    place = check_device(owner, "device", device)
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[Callable[[torch.Generator, torch.device], Iterator[Equivalence]], ...] = (
        _transport_against_pot,
        _certificates,
        _other_entropies,
        _attention_against_transport,
        _certified_attention,
        _lanes_against_dense,
        _gradients,
        _sinks_against_transport,
    )
    rows = tuple(row for part in parts for row in part(generator, place))
    return EquivalenceReport(rows, str(place))


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to max(1, size)."""
    expected = expected.detach().double().cpu()
    deviation = (actual.detach().double().cpu() - expected).abs().max()
    return float(deviation / expected.abs().max().clamp(min=1.0))


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation of an entry relative to that entry."""
    deviation = (actual - expected).abs()
    return float((deviation / expected.abs().clamp(min=torch.finfo(expected.dtype).tiny)).max())


def _worst(errors: list[float]) -> float:
    """The largest error; NaN if one is."""
    return float(torch.tensor(errors).max())


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _random_problem(generator: torch.Generator, low: float = -1.0) -> TransportProblem:
    """Uneven sizes, a mask, epsilon from 10^low to 10, a log-prior of a few nats."""
    n, m = (int(size) for size in torch.randint(3, 14, (2,), generator=generator))
    log_prior = 2 * torch.randn(n, m, generator=generator, dtype=torch.float64)
    masked = torch.rand(n, m, generator=generator) < 0.1
    masked[:, 0] = False
    epsilon = 10 ** _uniform(generator, low, 1)
    score = 3 * torch.randn(n, m, generator=generator, dtype=torch.float64)
    log_prior = log_prior.masked_fill(masked, -math.inf)
    return TransportProblem(score, epsilon=epsilon, log_prior=log_prior)


def _with_marginals(
    problem: TransportProblem,
    generator: torch.Generator,
    query_penalty: float = math.inf,
    key_penalty: float = math.inf,
) -> TransportProblem:
    """The same scores between two random marginals; without the mask, through which they may be out of reach."""
    assert problem.log_prior is not None
    query, key = (torch.randn(size, generator=generator, dtype=torch.float64) for size in problem.score.shape)
    return TransportProblem(
        problem.score,
        epsilon=problem.epsilon,
        log_prior=problem.log_prior.clamp(min=-6.0),
        query_marginal=query.softmax(0),
        key_marginal=key.softmax(0),
        query_penalty=query_penalty,
        key_penalty=key_penalty,
    )


def _transport_against_pot(generator: torch.Generator, _: torch.device) -> Iterator[Equivalence]:
    from eotattn.transport import pot

    one_sided, independent, newton, sinkhorn, unbalanced = [], [], [], [], []
    for _index in range(20):
        free = _random_problem(generator)
        one_sided.append(_relative_error(solve(free).coupling, pot.solve(free).coupling))
        free = _random_problem(generator, low=0.3)  # Sinkhorn, POT's or ours, slows down at low temperatures
        coupling = solve(free).coupling
        independent.append(_error(coupling, pot.fixed_key_marginal(free, coupling.sum(-2))[0]))
        balanced = _with_marginals(free, generator)
        expected = pot.solve(balanced).coupling
        newton.append(_error(solve(balanced, solver="newton").coupling, expected))
        sinkhorn.append(_error(solve(balanced, solver="sinkhorn").coupling, expected))
        soft = _with_marginals(
            free, generator, query_penalty=_uniform(generator, 0.5, 2), key_penalty=_uniform(generator, 2, 5)
        )
        unbalanced.append(_error(solve(soft).coupling, pot.solve(soft).coupling))
    yield Equivalence("one-sided: closed form = POT, semi-relaxed solver", _worst(one_sided), 1e-12)
    yield Equivalence("one-sided: closed form = POT, Sinkhorn at its own key marginal", _worst(independent), 1e-10)
    yield Equivalence("two-sided: Newton = POT", _worst(newton), 1e-10)
    yield Equivalence("two-sided: Sinkhorn = POT", _worst(sinkhorn), 1e-10)
    yield Equivalence("unbalanced, unequal penalties: Newton = POT", _worst(unbalanced), 1e-10)


def _certificates(generator: torch.Generator, _: torch.device) -> Iterator[Equivalence]:
    gaps: dict[str, list[float]] = {"closed_form": [], "newton": [], "sinkhorn": []}
    for _index in range(20):
        free = _random_problem(generator, low=0.3)
        balanced = _with_marginals(free, generator)
        for method, problem in (("closed_form", free), ("newton", balanced), ("sinkhorn", balanced)):
            gaps[method].append(abs(float(solve(problem, solver=method).gap)))
    yield Equivalence("one-sided: duality gap of the closed form = 0", _worst(gaps["closed_form"]), 1e-12)
    yield Equivalence("two-sided: duality gap of Newton = 0", _worst(gaps["newton"]), 1e-10)
    yield Equivalence("two-sided: duality gap of Sinkhorn = 0", _worst(gaps["sinkhorn"]), 1e-10)


def _other_entropies(generator: torch.Generator, _: torch.device) -> Iterator[Equivalence]:
    """Sparsemax and entmax around a prior: a Newton method on logs against a bisection on the plain formula."""
    for name, fixed in (("sparsemax", 2.0), ("entmax 1.5", 1.5), ("entmax, any alpha", None)):
        errors, gaps, gradients = [], [], []
        for _index in range(5):
            free = _random_problem(generator)
            regulariser = Tsallis(_uniform(generator, 1.05, 1.95) if fixed is None else fixed)
            score = free.score.requires_grad_()
            problem = TransportProblem(score, epsilon=free.epsilon, log_prior=free.log_prior, regulariser=regulariser)
            solution = solve(problem)
            weights = _bisected(problem)
            errors.append(_error(solution.attention_weights, weights))
            gaps.append(float(solution.gap))
            target = torch.randn(score.shape, generator=generator, dtype=torch.float64)
            (found,) = torch.autograd.grad((solution.attention_weights * target).sum(), score)
            assert free.log_prior is not None
            prior = free.log_prior.exp() * (weights > 0)
            bend = prior**regulariser.beta * weights ** (1 - regulariser.beta)
            advantage = target - (bend * target).sum(-1, keepdim=True) / bend.sum(-1, keepdim=True)
            gradients.append(_error(found, bend * advantage / problem.epsilon))
        yield Equivalence(f"one-sided, {name}: weights = bisection", _worst(errors), 1e-10)
        yield Equivalence(f"one-sided, {name}: duality gap = 0", _worst(gaps), 1e-12)
        yield Equivalence(f"one-sided, {name}: implicit gradient = Jacobian formula", _worst(gradients), 1e-9)


def _bisected(problem: TransportProblem) -> Tensor:
    """``prior [1 + (alpha - 1) (score / epsilon - threshold)]_+^(1 / (alpha - 1))``, the threshold by bisection."""
    assert problem.regulariser is not None
    assert problem.log_prior is not None
    beta, prior, logits = problem.regulariser.beta, problem.log_prior.exp(), problem.score.detach() / problem.epsilon
    high = logits.amax(-1, keepdim=True) + 1 / beta
    low = (logits - (prior**-beta - 1) / beta).amax(-1, keepdim=True)  # where one key alone would have all
    for _ in range(100):
        middle = (low + high) / 2
        weights = prior * (1 + beta * (logits - middle)).clamp(min=0) ** (1 / beta)
        above = weights.sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return weights


def _randomised(prior: LogPrior, generator: torch.Generator) -> LogPrior:
    """A prior away from its neutral start."""
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return prior


def _content(generator: torch.Generator, heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, heads, queries, 8), (2, heads, keys, 8), (2, heads, keys, 8))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


def _attention_against_transport(generator: torch.Generator, device: torch.device) -> Iterator[Equivalence]:
    query, key, value = _content(generator, 3, 7, 7)
    prior = _randomised(goat_prior(3, num_frequencies=3, length_scale=16.0), generator).to(device)
    positions = torch.arange(7)
    log_prior = prior.dense(positions.to(device), positions.to(device), dtype=torch.float64).cpu()
    log_prior = log_prior.masked_fill(positions > positions[:, None], -math.inf)
    problem = TransportProblem(query @ key.transpose(-1, -2), epsilon=math.sqrt(8), log_prior=log_prior)
    expected = solve(problem).attention_weights @ value
    for backend in ("reference", "sdpa"):
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            moved = (tensor.to(device, dtype) for tensor in (query, key, value))
            output = prior_attention(*moved, prior=prior, is_causal=True, backend=backend)
            assert isinstance(output, Tensor)
            name = str(dtype).removeprefix("torch.")
            yield Equivalence(f"attention = transport: {backend}, {name}", _error(output, expected), bound)


def _certified_attention(generator: torch.Generator, device: torch.device) -> Iterator[Equivalence]:
    """The weights that attention calls use, read off with unit vectors as values, have a duality gap of nothing."""
    query, key, _ = _content(generator, 3, 7, 7)
    prior = _randomised(goat_prior(3, num_frequencies=3, length_scale=16.0), generator).to(device)
    positions = torch.arange(7, device=device)
    log_prior = prior.dense(positions, positions, dtype=torch.float64).detach().cpu()
    log_prior = log_prior.masked_fill((positions > positions[:, None]).cpu(), -math.inf)
    unit = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    for backend in ("reference", "sdpa"):
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-9), (torch.bfloat16, 1e-3)):
            query, key = (tensor.to(dtype).double() for tensor in (query, key))  # the problem that the kernel is given
            moved = (tensor.to(device, dtype) for tensor in (query, key, unit))
            weights = prior_attention(*moved, prior=prior, is_causal=True, backend=backend)
            assert isinstance(weights, Tensor)
            certificate = certify(weights.detach().cpu(), query @ key.mT, log_prior, math.sqrt(8))
            name = f"certified gap of attention = 0: {backend}, {str(dtype).removeprefix('torch.')}"
            yield Equivalence(name, float(certificate.gap.max()), bound)


def _lanes_against_dense(generator: torch.Generator, device: torch.device) -> Iterator[Equivalence]:
    fourier, axis = FourierPrior(3, 4, 3.0, 64.0), FourierPrior(3, 2, 3.0, 8.0)
    cases: dict[str, LogPrior] = {
        "FourierPrior": fourier,
        "RecencyPrior": RecencyPrior(3),
        "SinkPrior": SinkPrior(3, length_scale=64.0),
        "goat_prior": goat_prior(3, num_frequencies=3),
        "GridPrior with class token": GridPrior(axis, FourierPrior(3, 2, 3.0, 8.0)) + ClassTokenPrior(3),
    }
    for name, prior in cases.items():
        moved = _randomised(prior, generator).to(device)
        on_grid = prior.num_coordinates == 2
        positions = (
            grid_positions(5, 8, class_token=True, device=device) if on_grid else torch.arange(41, device=device)
        )
        dense = moved.dense(positions, positions, dtype=torch.float64)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
            lanes = moved.lanes(positions, positions, dtype=dtype, tolerance=1e-5)
            difference = lanes.dense().double() - dense
            centred = difference - difference.mean(dim=-1, keepdim=True)
            error = _error(centred, torch.zeros_like(centred))
            yield Equivalence(f"lanes = dense: {name}, {str(dtype).removeprefix('torch.')}", error, bound)


def _gradients(generator: torch.Generator, device: torch.device) -> Iterator[Equivalence]:
    query, key, value = (tensor.to(device) for tensor in _content(generator, 2, 5, 7))
    target = torch.randn(2, 2, 5, 8, generator=generator, dtype=torch.float64).to(device)
    scale = 1 / math.sqrt(8)
    query.requires_grad_()
    result = prior_attention(query, key, value, return_weights=True)
    output, weights = result
    (measured,) = torch.autograd.grad((output * target).sum(), query)
    reward = target @ value.transpose(-1, -2)
    advantage = weights * (reward - (weights * reward).sum(dim=-1, keepdim=True))
    yield Equivalence("gradient = advantage: reference, float64", _error(measured, scale * advantage @ key), 1e-12)
    fused = prior_attention(query, key, value, backend="sdpa")
    assert isinstance(fused, Tensor)
    (measured,) = torch.autograd.grad((fused * target).sum(), query)
    yield Equivalence("gradient = advantage: sdpa, float64", _error(measured, scale * advantage @ key), 1e-12)
    problem = TransportProblem((query @ key.transpose(-1, -2)).detach().requires_grad_(), epsilon=1.5)
    value_gradient = torch.autograd.grad(solve(problem).primal.sum(), problem.score)[0]
    coupling = solve(problem).coupling
    yield Equivalence("gradient of the optimal value = -coupling", _error(value_gradient, -coupling), 1e-12)


def _sinks_against_transport(generator: torch.Generator, device: torch.device) -> Iterator[Equivalence]:
    """Attention with sinks is transport with a dummy key, whatever kernel serves the keys."""
    query, key, value = _content(generator, 3, 7, 7)
    prior = _randomised(goat_prior(3, num_frequencies=3, length_scale=16.0), generator).to(device)
    logits = torch.randn(3, generator=generator, dtype=torch.float64)
    positions = torch.arange(7, device=device)
    log_prior = prior.dense(positions, positions, dtype=torch.float64).detach().cpu()
    log_prior = log_prior.masked_fill((positions > positions[:, None]).cpu(), -math.inf)
    problem = with_dummy_key(query @ key.mT, logits[:, None], epsilon=math.sqrt(8), log_prior=log_prior)
    expected = solve(problem).attention_weights[..., :-1] @ value
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        moved = (tensor.to(device, dtype) for tensor in (query, key, value))
        sinks = logits.to(device, dtype)
        output = prior_attention(*moved, prior=prior, is_causal=True, sinks=sinks, backend="sdpa")
        assert isinstance(output, Tensor)
        name = f"attention with sinks = transport with a dummy key: sdpa, {str(dtype).removeprefix('torch.')}"
        yield Equivalence(name, _error(output, expected), bound)
