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
from eotattn.priors import LogPrior, grid_positions

__all__ = ["CHECKS", "Case", "check_prior"]

#: Largest admissible error, relative to the larger of one and the largest number compared.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
#: The same for gradients. Those of 16-bit lanes are rounded to that dtype, as are features written in one piece.
GRADIENT_TOLERANCE = {**TOLERANCE, torch.bfloat16: 4e-2, torch.float16: 5e-3}
#: A stated error bound of 16-bit lanes above this (nats, relative to the log-prior's range) says nothing.
USEFUL_BOUND = 5e-2


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

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Two samples of positions, the second in reverse order."""
        queries, keys = (torch.stack([side, side.flip(0)]) for side in self.positions)
        return queries, keys

    def dense(self, prior: LogPrior) -> Tensor:
        """The log-prior in float64, (H, Q, K)."""
        return prior.dense(*self.positions, dtype=torch.float64)

    def lanes(self, prior: LogPrior, **options: Any) -> Tensor:
        """The inner product of lanes, in float64 unless the options say otherwise, (H, Q, K)."""
        return prior.lanes(*self.positions, **{"dtype": torch.float64, **options}).dense()

    def zero_sum_weight(self, seed: int) -> Tensor:
        """(H, Q, K) generic numbers whose rows sum to zero, as the gradient of any attention does."""
        shape = (self.make_prior().num_heads, len(self.query_positions), len(self.key_positions))
        return _centred(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def check_prior(
    make_prior: Callable[[], LogPrior],
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    skip: Collection[str] = (),
) -> None:
    """Check that a prior keeps the contract of :class:`~eotattn.priors.LogPrior`.

    Its forms agree with each other and with their stated bounds, at positions of every kind; so do gradients, which
    reach every parameter at the start; copies, casts and loaders leave it as it is. Each entry of :data:`CHECKS` says
    what it compares.

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
    given = (query_positions, key_positions)
    positions = [b if a is None else a for a, b in zip(given, _default_positions(prior), strict=True)]
    for name, check in CHECKS.items():
        if name not in skip:
            check(Case(make_prior, *positions))


def check_dense(case: Case) -> None:
    """Dense has shape (H, Q, K) and the dtype asked for, without NaN and +inf; equal constructions are equal."""
    prior, name = case.make_prior(), "dense"
    shape = (prior.num_heads, len(case.query_positions), len(case.key_positions))
    for dtype in TOLERANCE:
        dense = prior.dense(*case.positions, dtype=dtype)
        _hold(tuple(dense.shape) == shape, name, f"shape is {tuple(dense.shape)}, must be {shape}")
        _hold(dense.dtype == dtype, name, f"dtype is {dense.dtype}, asked for {dtype}")
        _hold(not bool((dense.isnan() | (dense == float("inf"))).any()), name, "there is a NaN or +inf")
    _equal(case.dense(case.make_prior()), case.dense(prior), name, "two priors of the same constructor")


def check_lanes(case: Case) -> None:
    """Lanes equal dense up to a constant of each row, as exactly as they state and as was asked; or there are none."""
    prior, name = case.make_prior(), "lanes"
    if not prior.has_lanes:
        _check_refusal(case, prior)
        return
    exact = case.dense(prior).detach()
    largest, spread = (max(1.0, float(matrix.abs().max())) for matrix in (exact, _centred(exact)))
    for dtype in GRADIENT_TOLERANCE:
        for num_kv_heads in {prior.num_heads, 1}:
            lanes = prior.lanes(*case.positions, dtype=dtype, num_kv_heads=num_kv_heads)
            sides = (lanes.query, lanes.key)
            _hold({side.dtype for side in sides} == {dtype}, name, f"lanes are {sides[0].dtype} and {sides[1].dtype}")
            heads = tuple(side.shape[-3] for side in sides)
            _hold(heads in ((prior.num_heads, 1), (prior.num_heads, num_kv_heads)), name, f"they have {heads} heads")
            numbers = (*(side.shape[-1] for side in sides), prior.num_lanes(dtype, num_kv_heads))
            _hold(len({*numbers}) == 1, name, f"queries, keys and num_lanes say {numbers} lanes in {dtype}")
            error, bound = _row_error(lanes.dense(), exact), lanes.error_bound
            if dtype in TOLERANCE:
                _hold(error <= TOLERANCE[dtype] * largest, name, f"error {error:.1e} in {dtype}")
            # centring takes off the mean error of a row, which doubles what an entry can be off by
            _hold(error <= 2 * bound, name, f"error {error:.1e} in {dtype} exceeds the stated bound {bound:.1e}")
            _hold(bound <= USEFUL_BOUND * largest, name, f"the stated bound {bound:.1e} in {dtype} says nothing")
            tight = _row_error(case.lanes(prior, dtype=dtype, num_kv_heads=num_kv_heads, tolerance=1e-5), exact)
            _hold(tight <= 1e-4 * spread, name, f"error {tight:.1e} in {dtype}, asked for 1e-5 nats")


def _check_refusal(case: Case, prior: LogPrior) -> None:
    try:
        case.lanes(prior)
    except NotImplementedError as refusal:
        known = type(prior).__name__ in str(refusal) or bool(list(prior.children()))
        _hold(known, "lanes", f"the refusal must name {type(prior).__name__}")
    else:
        _hold(False, "lanes", "has_lanes is false, so lanes() must raise NotImplementedError")


def check_query_scale(case: Case) -> None:
    """A factor on the inner product, which undoes the kernel's scale, scales the inner product, in range of float16."""
    prior, name = case.make_prior(), "query_scale"
    if prior.has_lanes:
        scaled = case.lanes(prior, query_scale=2.5)
        _close(scaled, 2.5 * case.lanes(prior), name, "scaled lanes and 2.5 times the lanes")
        small = prior.lanes(*case.positions, dtype=torch.float16, query_scale=700.0)
        finite = bool(small.query.isfinite().all() & small.key.isfinite().all())
        _hold(finite, name, "float16 lanes overflow at a scale of 1 / 700")


def check_score_mod(case: Case) -> None:
    """The FlexAttention form adds the dense log-prior, for given positions and for the indices themselves."""
    prior, name = case.make_prior(), "score_mod"
    dense = prior.dense(*case.positions)
    _close(_modified(prior, dense.shape, case.positions), dense, name, "score_mod and dense")
    if prior.num_coordinates == 1:
        queries, keys = torch.arange(dense.shape[1]), torch.arange(dense.shape[2])
        by_index = _modified(prior, dense.shape, (None, None))
        _close(by_index, prior.dense(queries, keys), name, "score_mod by index and dense")
    by_sample = _modified(prior, dense.shape, case.batch, sample=1)
    _close(by_sample, dense.flip(1, 2), name, "score_mod of the second sample and dense")


def check_batches(case: Case) -> None:
    """One row of positions a sample gives what a loop over the samples gives, in every form."""
    prior, name, (queries, keys) = case.make_prior(), "batches", case.batch
    pairs = {
        "both batched": (queries, keys),
        "one row": (queries[:1], keys[:1]),
        "queries batched": (queries, keys[0]),
        "keys batched": (queries[0], keys),
    }
    for what, pair in pairs.items():
        rows = zip(*(side if side.dim() == queries.dim() else [side] * 2 for side in pair), strict=True)
        loop = torch.stack([prior.dense(*row, dtype=torch.float64) for row in rows])
        _check_part(Case(case.make_prior, *pair), loop, name, f"with {what}")


def _check_part(part: Case, expected: Tensor, name: str, what: str) -> None:
    prior = part.make_prior()
    _close(part.dense(prior), expected, name, f"dense {what} and the whole")
    if prior.has_lanes:
        _close(_centred(part.lanes(prior)), _centred(expected), name, f"lanes {what} and the whole")


def check_chunks(case: Case) -> None:
    """A chunk of the positions gives that slice of the whole matrix: nothing depends on the current length."""
    whole, (queries, keys) = case.dense(case.make_prior()), case.positions
    q, k = max(1, len(queries) // 2), max(1, len(keys) // 3)
    slices = ((slice(q, None), slice(None)), (slice(None), slice(k)), (slice(q - 1, q), slice(k, None)))
    for rows, columns in slices:
        if len(queries[rows]) > 0 and len(keys[columns]) > 0:
            _check_part(
                Case(case.make_prior, queries[rows], keys[columns]), whole[:, rows, columns], "chunks", "of a chunk"
            )


def check_gradients(case: Case) -> None:
    """Dense and lanes have the same derivatives, in float64 and for every kernel dtype."""
    prior = case.make_prior()
    if not prior.has_lanes:
        return
    weight = case.zero_sum_weight(seed=1)
    dense = _gradients(prior, weight, case.dense)
    # A slope's gradient through lanes is a sum of (weight * position) that cancels down to weight * lag.
    cancelled = max(1.0, float(case.key_positions.abs().max()) / len(case.key_positions))
    for dtype, tolerance in GRADIENT_TOLERANCE.items():
        lanes = _gradients(prior, weight, partial(case.lanes, dtype=dtype))
        for parameter, expected in dense.items():
            what = f"the gradient of {parameter} through dense and {dtype} lanes"
            _close(lanes[parameter], expected, "gradients", what, tolerance * cancelled)


def check_start(case: Case) -> None:
    """After ``reset_parameters`` every trainable parameter of every head is reached by some loss or its negative."""
    prior, weight = case.make_prior(), case.zero_sum_weight(seed=2)
    prior.reset_parameters()
    # one sign may be blocked: a parameter at the border of its range can move only inwards
    up, down = (_gradients(prior, sign * weight, case.dense) for sign in (1, -1))
    for parameter in up:
        size = up[parameter].abs() + down[parameter].abs()
        heads = prior.num_heads if size.shape[:1] == (prior.num_heads,) else 1
        reached = bool(size.reshape(heads, -1).any(-1).all())
        _hold(reached, "start", f"{parameter} has no gradient at the start and can never learn")


def check_moves(case: Case) -> None:
    """``.half()``, ``.to(...)`` and their kin, also on a parent, keep dtypes, parameters and outputs as they are."""
    expected = case.dense(case.make_prior())
    casts = (("half",), ("bfloat16",), ("double",), ("to", torch.bfloat16), ("to", "cpu", torch.float16))
    for name, *arguments in casts:
        prior = case.make_prior()
        before = {key: tensor.dtype for key, tensor in prior.state_dict().items()}
        getattr(nn.ModuleList([prior]), name)(*arguments)
        after = {key: tensor.dtype for key, tensor in prior.state_dict().items()}
        _hold(before == after, "moves", f"{name} changed dtypes from {before} to {after}")
        _equal(case.dense(prior), expected, "moves", f"dense after and before {name}")


def check_state(case: Case) -> None:
    """The state dict holds all there is: loading it repairs a prior that was spoilt, or allocated on another device."""
    prior, file = case.make_prior(), io.BytesIO()
    torch.save(prior.state_dict(), file)
    moved = case.make_prior().to("meta")
    kept = {str(tensor.device) for tensor in (*moved.parameters(), *moved.buffers())} - {"meta"}
    _hold(not kept, "state", f"tensors stay on {kept} when the prior goes to the meta device")
    for other in (case.make_prior(), moved.to_empty(device="cpu")):
        file.seek(0)
        _spoilt(other).load_state_dict(torch.load(file, weights_only=True))
        _equal(case.dense(other), case.dense(prior), "state", "dense after loading and before")


def check_copies(case: Case) -> None:
    """``copy.deepcopy`` and ``pickle`` give an equal prior that shares no memory."""
    prior = case.make_prior()
    expected = case.dense(prior).detach()
    for name, other in (("deepcopy", copy.deepcopy(prior)), ("pickle", pickle.loads(pickle.dumps(prior)))):
        _equal(case.dense(other), expected, "copies", f"dense of the {name}")
        _spoilt(other)
        _equal(case.dense(prior), expected, "copies", f"dense after spoiling {name}")


def check_reset(case: Case) -> None:
    """``reset_parameters`` fills a prior that was made on the meta device, and then allocated, completely."""
    prior, moved = case.make_prior(), _spoilt(case.make_prior().to("meta").to_empty(device="cpu"))
    for one in (prior, moved):
        one.reset_parameters()
    _equal(case.dense(moved), case.dense(prior), "reset", "dense after to_empty and reset")


def check_freeze(case: Case) -> None:
    """A frozen prior is the same prior without trainable parameters."""
    prior = case.make_prior()
    expected = case.dense(prior)
    _hold(prior.freeze() is prior, "freeze", "freeze() must return the prior itself")
    frozen, trainable = case.dense(prior), [name for name, number in prior.named_parameters() if number.requires_grad]
    _hold(not trainable, "freeze", f"{trainable} are still trainable")
    _hold(not frozen.requires_grad, "freeze", "dense still asks for a gradient")
    _equal(frozen, expected, "freeze", "dense after and before")


def check_algebra(case: Case) -> None:
    """Multiples and sums of a prior are multiples and sums in every form."""
    prior, name = case.make_prior(), "algebra"
    exact = case.dense(prior)
    combined = {"multiple": (-0.75 * prior, -0.75, 1), "sum": (prior + 0.5 * case.make_prior(), 1.5, 2)}
    for what, (result, factor, copies) in combined.items():
        expected = torch.where(exact.isfinite(), factor * exact, exact)  # an inadmissible key stays so
        _close(case.dense(result), expected, name, f"dense of the {what} and the {what} of dense")
        modified = _modified(result, exact.shape, case.positions)
        _close(modified, expected.float(), name, f"score_mod of the {what} and the {what} of dense")
        _hold(result.has_lanes == prior.has_lanes, name, f"has_lanes differs between a prior and its {what}")
        if prior.has_lanes:
            lanes = factor * case.lanes(prior)
            _close(case.lanes(result), lanes, name, f"lanes of the {what} and the {what} of lanes")
            _hold(result.num_lanes() == copies * prior.num_lanes(), name, f"the {what} has {result.num_lanes()} lanes")
        fresh = _spoilt(copy.deepcopy(result))
        fresh.load_state_dict(result.state_dict())
        _equal(case.dense(fresh), case.dense(result), name, f"dense of the {what} after loading and before")


#: Every check of the contract, by name, in the order in which :func:`check_prior` runs them.
CHECKS: dict[str, Callable[[Case], None]] = {
    name.removeprefix("check_"): check
    for name, check in tuple(globals().items())
    if name.startswith("check_") and check is not check_prior
}


def _gradients(prior: LogPrior, weight: Tensor, compute: Callable[[LogPrior], Tensor]) -> dict[str, Tensor]:
    """Gradients of sum(weight * compute(prior)) with respect to parameters widened to float64."""
    wide = copy.deepcopy(prior)
    trainable = [name for name, parameter in prior.named_parameters() if parameter.requires_grad]
    parameters = {name: nn.Parameter(wide.get_parameter(name).double()) for name in trainable}
    for name, parameter in parameters.items():
        owner, _, attribute = name.rpartition(".")
        setattr(wide.get_submodule(owner), attribute, parameter)
    if not parameters:
        return {}
    value = compute(wide).double()
    value = torch.where(value.isfinite(), value, 0.0)
    gradients = torch.autograd.grad((weight * value).sum(), list(parameters.values()), allow_unused=True)
    missing = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    _hold(not missing, "gradients", f"{missing} do not take part in the log-prior")
    return dict(zip(parameters, gradients, strict=True))


def _default_positions(prior: LogPrior) -> tuple[Tensor, Tensor]:
    if prior.num_coordinates == 1:
        return torch.arange(2, 7), torch.arange(7)
    grid = grid_positions(2, 3, class_token=True)
    grid = torch.cat([grid, grid[:, :1].expand(-1, prior.num_coordinates - 2)], dim=-1)
    return grid[:5], grid


def _spoilt(prior: LogPrior) -> LogPrior:
    """The prior itself with NaN, or the wrong number, for every number that a loader could fill."""
    with torch.no_grad():
        for tensor in (*prior.parameters(), *prior.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    return prior


def _modified(prior: LogPrior, shape: torch.Size, positions: tuple[Tensor | None, ...], *, sample: int = 0) -> Tensor:
    """What the score modification adds to a score that is not zero: (H, Q, K)."""
    heads, queries, keys = (torch.arange(size) for size in shape)
    grid = (torch.tensor(sample), heads[:, None, None], queries[:, None], keys)
    score = torch.full(tuple(shape), 0.5)
    return prior.score_mod(*positions)(score, *grid) - score


def _centred(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(dim=-1, keepdim=True)


def _row_error(actual: Tensor, expected: Tensor) -> float:
    return float((_centred(actual.double()) - _centred(expected)).detach().abs().max())


def _hold(condition: bool, check: str, message: str) -> None:
    if not condition:
        raise AssertionError(f"LogPrior contract, {check}: {message}.")


def _equal(actual: Tensor, expected: Tensor, check: str, what: str) -> None:
    _hold(torch.equal(actual, expected), check, f"{what} must be equal, bit by bit")


def _close(actual: Tensor, expected: Tensor, check: str, what: str, tolerance: float | None = None) -> None:
    _hold(actual.shape == expected.shape, check, f"{what} have shapes {tuple(actual.shape)}, {tuple(expected.shape)}")
    error = torch.where(actual == expected, 0.0, (actual - expected).abs()).nan_to_num(nan=float("inf"))
    largest = max(1.0, float(expected.detach().abs().nan_to_num(posinf=0.0).max()))
    bound = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    worst = float(error.detach().max()) / largest
    _hold(worst <= bound, check, f"{what} differ by {worst:.1e}, more than {bound:.0e}")
