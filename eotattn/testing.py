"""Contract checks for people who write a new prior.

Legend: B batch, H heads, Q queries, K keys, P lanes.

:func:`check_prior` runs every check of :data:`CHECKS` on one constructor. A check raises ``AssertionError`` with what
was compared, the measured error and its bound; it needs no test runner.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eotattn.checks import require
from eotattn.priors import Lanes, LogPrior, grid_positions

__all__ = ["CHECKS", "Case", "check_prior"]

#: Largest admissible error, relative to the larger of one and the largest number compared.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
#: The same for gradients. Those of 16-bit lanes are rounded to that dtype, as are features written in one piece.
GRADIENT_TOLERANCE = {**TOLERANCE, torch.bfloat16: 4e-2, torch.float16: 5e-3}
#: A stated error bound of 16-bit lanes above this (nats, relative to the log-prior's range) says nothing.
USEFUL_BOUND = 5e-2
KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One prior under test.

    Args:
        make_prior: Builds the prior; called many times, must give equal priors.
        query_positions: (Q,), or (Q, C) on grids.
        key_positions: (K,), or (K, C) on grids.
    """

    make_prior: Callable[[], LogPrior]
    query_positions: Tensor
    key_positions: Tensor

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Query positions and key positions."""
        return self.query_positions, self.key_positions


def check_prior(
    make_prior: Callable[[], LogPrior],
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    skip: Collection[str] = (),
) -> None:
    """Check that a prior keeps the contract of :class:`~eotattn.priors.LogPrior`.

    The checks: dense shape, dtype and finiteness; dense = lanes up to a row constant in float64 (1e-12), float32 (1e-5)
    and within the stated bound in bfloat16 and float16; dense = score modification; batched positions, offsets and
    chunks; gradients of dense and lanes agree; every parameter is reached by a gradient at the start; moves of dtype
    leave the prior as it is; state dict, deepcopy, pickle and meta device; freeze, scale and sum.

    Args:
        make_prior: Builds the prior; called many times, must give equal priors. Best off its neutral start, so that
            nothing is compared with zero.
        query_positions: (Q,) int64, or (Q, C) on grids; by default 2 to 6, or part of a 2 x 3 grid with a class token.
        key_positions: (K,) int64, or (K, C) on grids; by default 0 to 6, or the whole of that grid.
        skip: Names from :data:`CHECKS` that the prior does not claim, e.g. ``"reset"`` for a prior that holds data
            given by the caller.

    Raises:
        AssertionError: If the prior breaks the contract; the message names the check.
        ValueError: If ``skip`` holds an unknown name.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> check_prior(lambda: RecencyPrior(3))
    """
    unknown = sorted(set(skip) - set(CHECKS))
    require(not unknown, "check_prior", "skip", f"hold names of {', '.join(CHECKS)}", unknown, "Check the spelling")
    prior = make_prior()
    _hold(isinstance(prior, LogPrior), "constructor", f"make_prior() gave {type(prior).__name__}, no LogPrior")
    queries, keys = _default_positions(prior)
    queries = queries if query_positions is None else query_positions
    keys = keys if key_positions is None else key_positions
    for name, check in CHECKS.items():
        if name not in skip:
            check(Case(make_prior, queries, keys))


def check_dense(case: Case) -> None:
    """Dense has shape (H, Q, K) and the dtype asked for, without NaN and +inf; equal constructions are equal."""
    prior, name = case.make_prior(), "dense"
    shape = (prior.num_heads, case.query_positions.shape[0], case.key_positions.shape[0])
    for dtype in (torch.float32, torch.float64):
        dense = prior.dense(*case.positions, dtype=dtype)
        _hold(tuple(dense.shape) == shape, name, f"shape is {tuple(dense.shape)}, must be {shape}")
        _hold(dense.dtype == dtype, name, f"dtype is {dense.dtype}, asked for {dtype}")
        _hold(not bool((dense.isnan() | (dense == float("inf"))).any()), name, "there is a NaN or +inf")
    again = case.make_prior().dense(*case.positions, dtype=torch.float64)
    _equal(again, prior.dense(*case.positions, dtype=torch.float64), name, "two priors of the same constructor")


def check_lanes(case: Case) -> None:
    """Lanes equal dense up to a constant of each row, in every dtype and for shared key heads; or there are none."""
    prior, name = case.make_prior(), "lanes"
    if not prior.has_lanes:
        try:
            prior.lanes(*case.positions, dtype=torch.float32)
        except NotImplementedError as refusal:
            known = type(prior).__name__ in str(refusal)
            _hold(known or bool(list(prior.children())), name, f"the refusal must name {type(prior).__name__}")
            return
        _hold(False, name, "has_lanes is false, so lanes() must raise NotImplementedError")
    exact = _centred(prior.dense(*case.positions, dtype=torch.float64).detach())
    largest = max(1.0, float(prior.dense(*case.positions).abs().max().detach()))
    for dtype in KERNEL_DTYPES:
        for num_kv_heads in {prior.num_heads, 1}:
            lanes = prior.lanes(*case.positions, dtype=dtype, num_kv_heads=num_kv_heads)
            _check_lane_shapes(prior, lanes, dtype, num_kv_heads)
            counted = prior.num_lanes(dtype, num_kv_heads)
            _hold(lanes.num_lanes == counted, name, f"{lanes.num_lanes} lanes in {dtype}, num_lanes says {counted}")
            error = float((_centred(lanes.dense().double().detach()) - exact).abs().max())
            bound = lanes.error_bound
            if dtype in TOLERANCE:
                _hold(error <= TOLERANCE[dtype] * largest, name, f"error {error:.1e} in {dtype}")
            # centring takes off the mean error of a row, which doubles what an entry can be off by
            _hold(error <= 2 * bound, name, f"error {error:.1e} in {dtype} exceeds the stated bound {bound:.1e}")
            _hold(bound <= USEFUL_BOUND * largest, name, f"the stated bound {bound:.1e} in {dtype} says nothing")


def check_tolerance(case: Case) -> None:
    """A tolerance in nats takes the lanes that keep it, as far as three numbers a factor can."""
    prior = case.make_prior()
    if prior.has_lanes:
        exact = _centred(prior.dense(*case.positions, dtype=torch.float64).detach())
        for dtype in (torch.bfloat16, torch.float16):
            lanes = prior.lanes(*case.positions, dtype=dtype, tolerance=1e-5)
            error = float((_centred(lanes.dense().double().detach()) - exact).abs().max())
            largest = max(1.0, float(exact.abs().max()))
            _hold(error <= 1e-4 * largest, "tolerance", f"error {error:.1e} in {dtype}, asked for 1e-5 nats")


def check_query_scale(case: Case) -> None:
    """A factor on the inner product, which undoes the kernel's scale, scales the inner product, in range of float16."""
    prior = case.make_prior()
    if prior.has_lanes:
        plain = prior.lanes(*case.positions, dtype=torch.float64).dense()
        scaled = prior.lanes(*case.positions, dtype=torch.float64, query_scale=2.5).dense()
        _close(scaled, 2.5 * plain, "query_scale", "scaled lanes and 2.5 times the lanes")
        small = prior.lanes(*case.positions, dtype=torch.float16, query_scale=700.0)
        finite = bool(small.query.isfinite().all() & small.key.isfinite().all())
        _hold(finite, "query_scale", "float16 lanes overflow at a scale of 1 / 700")


def check_score_mod(case: Case) -> None:
    """The FlexAttention form adds the dense log-prior, for given positions and for the indices themselves."""
    prior = case.make_prior()
    dense = prior.dense(*case.positions)
    _close(_modified(prior, dense.shape, case.positions), dense, "score_mod", "score_mod and dense")
    if prior.num_coordinates == 1:
        queries, keys = torch.arange(dense.shape[1]), torch.arange(dense.shape[2])
        by_index = _modified(prior, dense.shape, (None, None))
        _close(by_index, prior.dense(queries, keys), "score_mod", "score_mod by index and dense")
    batched = tuple(torch.stack([side, side.flip(0)]) for side in case.positions)
    by_sample = _modified(prior, dense.shape, batched, sample=1)
    _close(by_sample, dense.flip(1, 2), "score_mod", "score_mod of the second sample and dense")


def check_batches(case: Case) -> None:
    """One row of positions a sample gives what a loop over the samples gives, in every form."""
    prior = case.make_prior()
    queries, keys = (torch.stack([side, side.flip(0)]) for side in case.positions)
    loop = torch.stack([prior.dense(q, k, dtype=torch.float64) for q, k in zip(queries, keys, strict=True)])
    pairs = {"both batched": (queries, keys), "one row": (queries[:1], keys[:1])}
    for what, pair in pairs.items():
        dense = prior.dense(*pair, dtype=torch.float64)
        _close(dense, loop[: dense.shape[0]], "batches", f"dense with {what} and a loop")
        if prior.has_lanes:
            lanes = prior.lanes(*pair, dtype=torch.float64).dense()
            _close(_centred(lanes), _centred(dense), "batches", f"lanes and dense with {what}")
    for pair in ((queries, keys[0]), (queries[0], keys)):
        dense = prior.dense(*pair, dtype=torch.float64)
        _hold(dense.shape == loop.shape, "batches", f"one batched side gives shape {tuple(dense.shape)}")
        if prior.has_lanes:
            lanes = prior.lanes(*pair, dtype=torch.float64).dense()
            _close(_centred(lanes), _centred(dense), "batches", "lanes and dense with one batched side")


def check_chunks(case: Case) -> None:
    """A chunk of the positions gives that slice of the whole matrix: nothing depends on the current length."""
    prior = case.make_prior()
    queries, keys = case.positions
    q, k = max(1, queries.shape[0] // 2), max(1, keys.shape[0] // 3)
    slices = ((slice(q, None), slice(None)), (slice(None), slice(k)), (slice(q - 1, q), slice(k, None)))
    whole = prior.dense(queries, keys, dtype=torch.float64)
    for rows, columns in slices:
        if keys[columns].shape[0] == 0 or queries[rows].shape[0] == 0:
            continue
        part = prior.dense(queries[rows], keys[columns], dtype=torch.float64)
        _close(part, whole[:, rows, columns], "chunks", "dense of a chunk and the slice")
        if prior.has_lanes:
            lanes = prior.lanes(queries[rows], keys[columns], dtype=torch.float64).dense()
            _close(_centred(lanes), _centred(part), "chunks", "lanes of a chunk and its dense form")


def check_gradients(case: Case) -> None:
    """Dense and lanes have the same derivatives, in float64 and for every kernel dtype."""
    prior = case.make_prior()
    if not prior.has_lanes or not _trainable(prior):
        return
    weight = _zero_sum_weight(prior, case, seed=1)
    dense = _gradients(prior, weight, lambda p: p.dense(*case.positions, dtype=torch.float64))
    # A slope's gradient through lanes is a sum of (weight * position) that cancels down to weight * lag.
    cancelled = max(1.0, float(case.key_positions.abs().max()) / case.key_positions.shape[0])
    for dtype in KERNEL_DTYPES:
        lanes = _gradients(prior, weight, partial(_dense_lanes, case=case, dtype=dtype))
        for parameter, expected in dense.items():
            what = f"the gradient of {parameter} through dense and {dtype} lanes"
            _close(lanes[parameter], expected, "gradients", what, GRADIENT_TOLERANCE[dtype] * cancelled)


def check_start(case: Case) -> None:
    """After ``reset_parameters`` every trainable parameter of every head is reached by a generic loss or its negative.

    One of the two signs may be blocked: a parameter at the border of its range can move only inwards.
    """
    prior = case.make_prior()
    prior.reset_parameters()
    weight = _zero_sum_weight(prior, case, seed=2)
    up = _gradients(prior, weight, lambda p: p.dense(*case.positions, dtype=torch.float64))
    down = _gradients(prior, -weight, lambda p: p.dense(*case.positions, dtype=torch.float64))
    for parameter in up:
        size = up[parameter].abs() + down[parameter].abs()
        by_head = size.dim() > 0 and size.shape[0] == prior.num_heads
        size = size.flatten(1).amax(1) if by_head and size.dim() > 1 else size
        reached = bool((size > 0).all()) if by_head else bool((size > 0).any())
        _hold(reached, "start", f"{parameter} has no gradient at the start and can never learn")


def check_moves(case: Case) -> None:
    """``.half()``, ``.to(...)`` and their kin, also on a parent, keep dtypes, parameters and outputs as they are."""
    expected = case.make_prior().dense(*case.positions, dtype=torch.float64)
    moves: dict[str, Callable[[nn.Module], Any]] = {
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "double": lambda m: m.double(),
        "to(dtype)": lambda m: m.to(torch.bfloat16),
        "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    }
    for name, move in moves.items():
        prior = case.make_prior()
        before = {key: tensor.dtype for key, tensor in prior.state_dict().items()}
        move(nn.ModuleList([prior]))
        after = {key: tensor.dtype for key, tensor in prior.state_dict().items()}
        _hold(before == after, "moves", f"{name} changed dtypes from {before} to {after}")
        _equal(prior.dense(*case.positions, dtype=torch.float64), expected, "moves", f"dense after and before {name}")


def check_state(case: Case) -> None:
    """The state dict holds all there is: loading it repairs a prior whose every number was spoilt."""
    prior, other = case.make_prior(), case.make_prior()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    file = io.BytesIO()
    torch.save(prior.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    expected = prior.dense(*case.positions, dtype=torch.float64)
    _equal(other.dense(*case.positions, dtype=torch.float64), expected, "state", "dense after loading and before")


def check_copies(case: Case) -> None:
    """``copy.deepcopy`` and ``pickle`` give an equal prior that shares no memory."""
    prior = case.make_prior()
    expected = prior.dense(*case.positions, dtype=torch.float64).detach()
    for name, other in (("deepcopy", copy.deepcopy(prior)), ("pickle", pickle.loads(pickle.dumps(prior)))):
        _equal(other.dense(*case.positions, dtype=torch.float64), expected, "copies", f"dense of the {name}")
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.fill_(0)
        _equal(prior.dense(*case.positions, dtype=torch.float64), expected, "copies", f"dense after spoiling {name}")


def check_meta_device(case: Case) -> None:
    """The prior survives the meta device: ``to_empty`` and its state dict restore it."""
    prior = case.make_prior()
    state = {key: tensor.clone() for key, tensor in prior.state_dict().items()}
    expected = prior.dense(*case.positions, dtype=torch.float64)
    moved = case.make_prior().to("meta")
    kept = {str(tensor.device) for tensor in (*moved.parameters(), *moved.buffers())} - {"meta"}
    _hold(not kept, "meta_device", f"tensors stay on {kept}")
    moved.to_empty(device="cpu").load_state_dict(state)
    _equal(moved.dense(*case.positions, dtype=torch.float64), expected, "meta_device", "dense after the round trip")


def check_reset(case: Case) -> None:
    """``reset_parameters`` fills a prior that was made on the meta device, and then allocated, completely."""
    prior = case.make_prior()
    prior.reset_parameters()
    expected = prior.dense(*case.positions, dtype=torch.float64)
    moved = case.make_prior().to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*moved.parameters(), *moved.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    moved.reset_parameters()
    _equal(moved.dense(*case.positions, dtype=torch.float64), expected, "reset", "dense after to_empty and reset")


def check_freeze(case: Case) -> None:
    """A frozen prior is the same prior without trainable parameters."""
    prior = case.make_prior()
    expected = prior.dense(*case.positions)
    _hold(prior.freeze() is prior, "freeze", "freeze() must return the prior itself")
    _hold(not _trainable(prior), "freeze", "a parameter is still trainable")
    frozen = prior.dense(*case.positions)
    _hold(not frozen.requires_grad, "freeze", "dense still asks for a gradient")
    _equal(frozen, expected, "freeze", "dense after and before")


def check_scale(case: Case) -> None:
    """A number times a prior scales every form of it."""
    prior = case.make_prior()
    scaled = -0.75 * prior
    expected = prior.dense(*case.positions, dtype=torch.float64)
    finite = expected.isfinite()
    dense = scaled.dense(*case.positions, dtype=torch.float64)
    _close(dense[finite], -0.75 * expected[finite], "scale", "dense of the multiple and the multiple of dense")
    _hold(scaled.has_lanes == prior.has_lanes, "scale", "has_lanes differs between a prior and its multiple")
    if prior.has_lanes:
        lanes = prior.lanes(*case.positions, dtype=torch.float64).dense()
        multiple = scaled.lanes(*case.positions, dtype=torch.float64).dense()
        _close(multiple, -0.75 * lanes, "scale", "lanes of the multiple and the multiple of the lanes")
    other = -0.75 * case.make_prior()
    other.load_state_dict(scaled.state_dict())
    _equal(other.dense(*case.positions, dtype=torch.float64)[finite], dense[finite], "scale", "dense after loading")


def check_sum(case: Case) -> None:
    """A sum of priors adds dense forms, concatenates lanes and chains score modifications."""
    first, second = case.make_prior(), 0.5 * case.make_prior()
    total = first + second
    expected = first.dense(*case.positions, dtype=torch.float64) + second.dense(*case.positions, dtype=torch.float64)
    _close(total.dense(*case.positions, dtype=torch.float64), expected, "sum", "dense of the sum and sum of the dense")
    modified = _modified(total, expected.shape, case.positions)
    _close(modified, expected.float(), "sum", "score_mod of the sum and the dense sum")
    _hold(total.has_lanes == first.has_lanes, "sum", "has_lanes differs between a prior and its sum")
    if total.has_lanes:
        lanes = total.lanes(*case.positions, dtype=torch.float64)
        parts = [part.lanes(*case.positions, dtype=torch.float64) for part in (first, second)]
        _close(lanes.dense(), parts[0].dense() + parts[1].dense(), "sum", "lanes of the sum and sum of the lanes")
        counted = sum(part.num_lanes for part in parts)
        _hold(lanes.num_lanes == counted, "sum", f"{lanes.num_lanes} lanes, the parts have {counted}")


#: Every check of the contract, by name, in the order in which :func:`check_prior` runs them.
CHECKS: dict[str, Callable[[Case], None]] = {
    "dense": check_dense,
    "lanes": check_lanes,
    "tolerance": check_tolerance,
    "query_scale": check_query_scale,
    "score_mod": check_score_mod,
    "batches": check_batches,
    "chunks": check_chunks,
    "gradients": check_gradients,
    "start": check_start,
    "moves": check_moves,
    "state": check_state,
    "copies": check_copies,
    "meta_device": check_meta_device,
    "reset": check_reset,
    "freeze": check_freeze,
    "scale": check_scale,
    "sum": check_sum,
}


class _Caller(nn.Module):
    """Lets ``functional_call`` replace the parameters of a prior whatever method is called."""

    def __init__(self, prior: LogPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, compute: Callable[[LogPrior], Tensor]) -> Tensor:
        return compute(self.prior)


def _default_positions(prior: LogPrior) -> tuple[Tensor, Tensor]:
    if prior.num_coordinates == 1:
        return torch.arange(2, 7), torch.arange(7)
    grid = grid_positions(2, 3, class_token=True)
    grid = torch.cat([grid, grid[:, :1].expand(-1, prior.num_coordinates - 2)], dim=-1)
    return grid[:5], grid


def _trainable(prior: LogPrior) -> list[str]:
    return [name for name, parameter in prior.named_parameters() if parameter.requires_grad]


def _check_lane_shapes(prior: LogPrior, lanes: Lanes, dtype: torch.dtype, num_kv_heads: int) -> None:
    query, key = lanes.query, lanes.key
    _hold(query.dtype == dtype and key.dtype == dtype, "lanes", f"lanes are {query.dtype} and {key.dtype}, not {dtype}")
    _hold(query.shape[-3] == prior.num_heads, "lanes", f"query lanes have shape {tuple(query.shape)}")
    _hold(key.shape[-3] in (1, num_kv_heads), "lanes", f"key lanes have shape {tuple(key.shape)}")
    _hold(query.shape[-1] == key.shape[-1], "lanes", "query and key lanes differ in number")


def _modified(prior: LogPrior, shape: torch.Size, positions: tuple[Tensor | None, ...], *, sample: int = 0) -> Tensor:
    """What the score modification adds to a score that is not zero: (H, Q, K)."""
    heads, queries, keys = (torch.arange(size) for size in shape)
    grid = (torch.tensor(sample), heads[:, None, None], queries[:, None], keys)
    score = torch.full(tuple(shape), 0.5)
    return prior.score_mod(*positions)(score, *grid) - score


def _zero_sum_weight(prior: LogPrior, case: Case, *, seed: int) -> Tensor:
    """(H, Q, K) generic numbers whose rows sum to zero, as the gradient of any attention does."""
    shape = (prior.num_heads, case.query_positions.shape[0], case.key_positions.shape[0])
    return _centred(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def _gradients(prior: LogPrior, weight: Tensor, compute: Callable[[LogPrior], Tensor]) -> dict[str, Tensor]:
    """Gradients of sum(weight * compute(prior)) with respect to parameters widened to float64."""
    caller, names = _Caller(prior), _trainable(prior)
    parameters = {f"prior.{name}": prior.get_parameter(name).detach().double().requires_grad_() for name in names}
    if not parameters:
        return {}
    value = torch.func.functional_call(caller, parameters, (compute,))
    value = torch.where(value.isfinite(), value, 0.0)
    gradients = torch.autograd.grad((weight * value).sum(), list(parameters.values()), allow_unused=True)
    missing = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    _hold(not missing, "gradients", f"{missing} do not take part in the log-prior")
    return {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _dense_lanes(prior: LogPrior, *, case: Case, dtype: torch.dtype) -> Tensor:
    return prior.lanes(*case.positions, dtype=dtype).dense().double()


def _centred(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(dim=-1, keepdim=True)


def _hold(condition: bool, check: str, message: str) -> None:
    if not condition:
        raise AssertionError(f"LogPrior contract, {check}: {message}.")


def _equal(actual: Tensor, expected: Tensor, check: str, what: str) -> None:
    _hold(torch.equal(actual, expected), check, f"{what} must be equal, bit by bit")


def _close(actual: Tensor, expected: Tensor, check: str, what: str, tolerance: float | None = None) -> None:
    """Hold that two tensors agree; infinite entries must be the same."""
    _hold(actual.shape == expected.shape, check, f"{what} have shapes {tuple(actual.shape)}, {tuple(expected.shape)}")
    same = actual == expected
    error = torch.where(same, 0.0, (actual - expected).abs()).nan_to_num(nan=float("inf"))
    finite = expected[expected.isfinite()].detach().abs()
    largest = max(1.0, float(finite.max()) if finite.numel() else 1.0)
    bound = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    worst = float(error.max().detach()) / largest
    _hold(worst <= bound, check, f"{what} differ by {worst:.1e}, more than {bound:.0e}")
