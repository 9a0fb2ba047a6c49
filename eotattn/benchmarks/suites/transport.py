"""The streaming solver: time of an iteration, memory, peers to the same error, and what each precision reaches.

Legend: n queries, m keys, d width, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.benchmarks import transport_peers
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.timing import Candidate, Row, measure
from eotattn.checks import check_choice
from eotattn.transport import Anderson, Auto, Sinkhorn, TransportProblem, TransportSolution, certify, solve

__all__ = ["transport"]

#: A tolerance that is never met.
NEVER = 1e-30
#: Solvers by the names that stored tables use.
SOLVERS = {"streaming": Anderson, "sinkhorn": Sinkhorn}
#: Kernels by name: the dtype of their operands, and PyTorch's setting for float32 products.
KERNELS = {
    "bf16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
    "fp64": (torch.float64, "highest"),
    "fp16": (torch.float16, "highest"),
}


def transport(config: Configuration) -> Iterator[Row]:
    """Every number that is asked of the solver; errors are in float64, relative to the total mass.

    ``error`` is the summed distance of the key masses from their marginal after the exact answer of the queries. Points
    and content are normal numbers rounded to bfloat16, so that every kernel solves the same problem.
    """
    check_choice("bench", "dtype", config.dtype, ("float32", "bfloat16"))
    parts = (_iteration, _memory, _equal_iterations, _equal_errors, _precisions, _closed_form, _dense)
    for part in parts:
        yield from part(config)


def _points(config: Configuration, length: int, seed: int, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed + seed)
    return torch.randn(length, width, generator=generator).bfloat16().to(config.place["device"])


def _problem(config: Configuration, length: int, dtype: torch.dtype, epsilon: float, *, points: bool) -> Any:
    """A balanced problem with uniform marginals, between points or as attention scores."""
    state = TransportProblem.from_points if points else TransportProblem.from_factors
    query, key = (_points(config, length, seed).to(dtype) for seed in (1, 2))
    own = torch.float64 if dtype == torch.float64 else torch.float32
    uniform = torch.full((length,), 1 / length, dtype=own, device=query.device)
    return state(query, key, epsilon=epsilon, key_marginal=uniform)


@contextmanager
def _products(kernel: str) -> Iterator[torch.dtype]:
    """Set how float32 products are rounded, and say which dtype the kernel takes."""
    before = torch.get_float32_matmul_precision()
    dtype, precision = KERNELS[kernel]
    torch.set_float32_matmul_precision(precision)
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before)


def _exact_error(config: Configuration, length: int, epsilon: float, key_potential: Tensor) -> float:
    """Marginal error of a key potential of the points' problem, in float64."""
    problem = _problem(config, length, torch.float64, epsilon, points=True)
    held = solve(problem, start=key_potential.double(), solver=Sinkhorn(tolerance=1e9, max_iterations=1))
    return float(held.marginal_error)


def _iteration(config: Configuration) -> list[Row]:
    """Whole iterations, set-up included, against twice as many bare SDPA forwards."""
    dtype, iterations = config.place["dtype"], 100 if config.sizes == "full" else 5
    rows: list[Row] = []
    for length in config.pick([250], [10_000, 32_768]):
        problem = _problem(config, length, dtype, 8.0, points=False)
        start = torch.zeros(length, device=problem.affinity.device)
        content = [_points(config, length, seed)[None, None].to(dtype) for seed in (1, 2, 3)]

        def forwards(content: list[Tensor] = content) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    for _ in range(2 * iterations):
                        functional.scaled_dot_product_attention(content[0], content[1], content[2])

            return run

        ours = partial(solve, problem, start=start, solver=Sinkhorn(tolerance=NEVER, max_iterations=iterations))
        candidates = [
            Candidate(f"{2 * iterations} SDPA forwards", forwards),
            Candidate(f"eotattn, {iterations} iterations", partial(_given, ours)),
        ]
        found = measure(candidates, device=start.device, rounds=min(5, config.rounds), warmup=1, calls=1)
        rows += [{"quantity": "iterations", "length": length, **row} for row in found]
    return rows


def _memory(config: Configuration) -> list[Row]:
    """Peak memory of a solution and of the coupling applied to values."""
    (length,) = config.pick([250], [131_072])
    problem = _problem(config, length, config.place["dtype"], 8.0, points=False)
    value = _points(config, length, 3)

    def run() -> Tensor:
        return solve(problem, solver=Anderson(tolerance=1e-4, max_iterations=10)).apply(value.float())

    name = f"eotattn, {config.dtype} kernel"
    (row,) = measure([Candidate(name, partial(_given, run))], device=value.device, rounds=1, warmup=1, calls=1)
    dense = {"name": "a dense plan in float32", "peak_mib": length**2 * 4 / 2**20}
    return [{"quantity": "memory", "length": length, **one} for one in (row, dense)]


def _equal_iterations(config: Configuration) -> list[Row]:
    """One hundred iterations from zero, against flash-sinkhorn."""
    iterations, epsilon = 100 if config.sizes == "full" else 5, 12.8
    rows: list[Row] = []
    for length, kernels in config.pick([(250, ["fp32"])], [(10_000, ["bf16", "tf32", "fp32"]), (50_000, ["bf16"])]):
        left, right = (_points(config, length, seed).float() for seed in (1, 2))
        peer = partial(transport_peers.flash_sinkhorn, left, right, epsilon, iterations)
        candidates = [_solver("flash-sinkhorn, tf32", peer, config, length, epsilon)]
        for kernel in kernels:
            ours = partial(_ours, config, length, epsilon, kernel, "sinkhorn", NEVER, iterations)
            candidates.append(_solver(f"eotattn, {kernel} kernel", ours, config, length, epsilon))
        found = measure(candidates, device=left.device, rounds=min(5, config.rounds), warmup=1, calls=1)
        at = {"quantity": "equal iterations", "length": length, "epsilon": epsilon, "iterations": iterations}
        rows += [{**at, **row} for row in found]
    return rows


def _equal_errors(config: Configuration) -> list[Row]:
    """The error that POT stops at, reached by each."""
    rows: list[Row] = []
    (length,) = config.pick([250], [8192])
    left, right = (_points(config, length, seed).float() for seed in (1, 2))
    limit = 5000 if config.sizes == "full" else 20
    for epsilon, threshold in config.pick([(12.8, 1e-4)], [(3.2, 1e-4), (3.2, 1e-6), (1.6, 1e-5)]):
        peer = partial(transport_peers.pot, left, right, epsilon, threshold)
        reached = _exact_error(config, length, epsilon, peer()())
        candidates = [_solver("POT, sinkhorn_log", peer, config, length, epsilon)]
        ott = partial(transport_peers.ott, left, right, epsilon, reached)
        candidates.append(_solver("OTT, Sinkhorn", ott, config, length, epsilon))
        for kernel in ("bf16", "fp32"):
            for method in ("streaming", "sinkhorn"):
                ours = partial(_ours, config, length, epsilon, kernel, method, reached, limit)
                candidates.append(_solver(f"eotattn, {method}, {kernel} kernel", ours, config, length, epsilon))
        found = measure(candidates, device=left.device, rounds=min(5, config.rounds), warmup=1, calls=1)
        at = {"quantity": "equal errors", "length": length, "epsilon": epsilon, "threshold": threshold}
        rows += [{**at, **row} for row in found]
    return rows


def _ours(
    config: Configuration,
    length: int,
    epsilon: float,
    kernel: str,
    method: str,
    tolerance: float,
    iterations: int,
) -> transport_peers.Potential:
    """Our solver on the points' problem; from zero where only the number of iterations stops it."""
    with _products(kernel) as dtype:
        problem = _problem(config, length, dtype, epsilon, points=True)
    start = None if tolerance > NEVER else torch.zeros(length, device=problem.affinity.device)

    def run() -> Tensor:
        with _products(kernel):
            found = solve(problem, start=start, solver=SOLVERS[method](tolerance=tolerance, max_iterations=iterations))
            return found.key_potential

    return run


def _solver(
    name: str, make: Callable[[], transport_peers.Potential], config: Configuration, length: int, epsilon: float
) -> Candidate:
    """A candidate whose error is that of the key potential it returns."""
    return Candidate(name, make, lambda: _exact_error(config, length, epsilon, make()()))


def _given(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def _precisions(config: Configuration) -> list[Row]:
    """What each kernel reaches, against float64, with uneven marginals: balanced, and with unequal penalties."""
    (length,) = config.pick([60], [4096])
    rows: list[Row] = []
    for name, penalties in (("balanced", (math.inf, math.inf)), ("unbalanced", (8.0, 24.0))):
        exact = _uneven(config, length, penalties, "fp64", 1e-11)
        for kernel, tolerance in (("bf16", 1e-5), ("tf32", 1e-6), ("fp32", 1e-6)):
            if kernel == "tf32" and config.device == "cpu":
                continue
            found = _uneven(config, length, penalties, kernel, tolerance)
            certificate = found.certificate
            row: Row = {"quantity": "precision", "length": length, "name": f"{name}, {kernel} kernel"}
            row["error"], row["gap"] = float(certificate.key_error), float(certificate.gap)
            row["distance"], row["converged"] = float(certificate.distance), bool(found.converged)
            row["iterations"] = int(found.num_iterations)
            row["key_mass"] = _largest_ratio(found.key_mass, exact.key_mass)
            row["query_mass"] = _largest_ratio(found.query_mass, exact.query_mass)
            rows.append(row)
    return rows


def _uneven(
    config: Configuration, length: int, penalties: tuple[float, float], kernel: str, tolerance: float
) -> TransportSolution:
    with _products(kernel) as dtype:
        query, key = (_points(config, length, seed).to(dtype) for seed in (1, 2))
        generator = torch.Generator().manual_seed(config.seed)
        masses = [torch.rand(length, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2)]
        own = torch.float64 if dtype == torch.float64 else torch.float32
        rows, columns = ((mass / mass.sum()).to(query.device, own) for mass in masses)
        problem = TransportProblem.from_factors(
            query,
            key,
            epsilon=8.0,
            query_marginal=rows,
            key_marginal=columns,
            query_penalty=penalties[0],
            key_penalty=penalties[1],
        )
        return solve(problem, solver=Auto(tolerance=tolerance, max_iterations=300))


def _largest_ratio(found: Tensor, exact: Tensor) -> float:
    """The largest relative error."""
    return float(((found.detach().double() - exact) / exact).abs().max())


def _closed_form(config: Configuration) -> list[Row]:
    """The certificate of fused attention itself: its weights read off with unit vectors as values."""
    (length,) = config.pick([60], [2048])
    rows: list[Row] = []
    for kernel in ("bf16", "fp32", "fp64"):
        dtype = KERNELS[kernel][0]
        query, key = (_points(config, length, seed)[None, None].to(dtype) for seed in (1, 2))
        with torch.no_grad():
            unit = torch.eye(length, dtype=dtype, device=query.device)[None, None]
            parts = [
                functional.scaled_dot_product_attention(query, key, part.contiguous(), scale=0.125)
                for part in unit.split(64, dim=-1)
            ]
            certificate = certify(torch.cat(parts, dim=-1), query.double() @ key.double().mT, None, 8.0)
        row: Row = {"quantity": "closed form", "length": length, "name": f"SDPA, {kernel}"}
        row["gap"], row["distance"] = float(certificate.gap), float(certificate.distance)
        row["error"] = float(certificate.query_error)
        rows.append(row)
    return rows


def _dense(config: Configuration) -> list[Row]:
    """Dense problems in float64: a half-step against log-sum-exp, and whole solutions against POT's fastest method."""
    from eotattn.transport import pot

    device = config.place["device"]
    rows: list[Row] = []
    (length,) = config.pick([50], [1000])
    sizes: list[tuple[int, ...]] = [(64, 20, 20), (64, 50, 50), (16, 100, 100), (1000, 1000), (2000, 2000)]
    generator = torch.Generator().manual_seed(config.seed)

    def table(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)

    score, potential, epsilon = table(length, length), table(length), 0.1
    half_step = partial(TransportProblem(score).affinity.soft_c_transform, potential, epsilon)
    candidates = [
        Candidate("torch.logsumexp", partial(_given, lambda: ((score + potential) / epsilon).logsumexp(-1))),
        Candidate("torch.logsumexp of ready logits", partial(_given, lambda: score.logsumexp(-1))),
        Candidate("eotattn, half-step", partial(_given, half_step)),
    ]
    found = measure(candidates, device=device, rounds=config.rounds, warmup=2, calls=1)
    rows += [{"quantity": "half-step", "length": length, **row} for row in found]
    for shape in config.pick([(4, 5, 6)], sizes):
        cost = table(*shape)
        sides = [cost.new_full((*shape[:-2], size), 1 / size) for size in shape[-2:]]
        for epsilon in (0.1, 0.01) if len(shape) == 2 else (0.1,):
            options = {"epsilon": epsilon, "tolerance": 1e-9}
            candidates = [
                Candidate("POT", partial(_given, partial(pot.plain_sinkhorn, cost, *sides, **options))),
                Candidate("eotattn", partial(_given, partial(_dense_solution, cost, sides[1], **options))),
            ]
            found = measure(candidates, device=device, rounds=min(9, config.rounds), warmup=1, calls=1)
            rows += [{"quantity": "dense", "shape": str(shape), "epsilon": epsilon, **row} for row in found]
    return rows


def _dense_solution(cost: Tensor, key_marginal: Tensor, *, epsilon: float, tolerance: float) -> TransportSolution:
    return solve(TransportProblem(-cost, epsilon=epsilon, key_marginal=key_marginal), Auto(tolerance=tolerance))
