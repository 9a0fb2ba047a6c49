"""The LogPrior contract: one elementwise formula, from which every other form follows.

Legend: B batch, H heads, Q queries, K keys, C coordinates.

A prior that fused kernels can carry states features and weights instead (:mod:`eotattn.priors.bilinear`). Sums,
multiples and choices of heads are what the operators of a prior make.
"""

from __future__ import annotations

import inspect
import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from eotattn.checks import check_positive, check_positive_int, fail, require
from eotattn.compat import listed
from eotattn.priors.far_form import FarForm, Tail
from eotattn.priors.flex_form import ScoreMod, score_mod_of
from eotattn.priors.lane_plan import LaneRequest, plan_lanes
from eotattn.priors.lanes import Lanes, make_lanes
from eotattn.priors.memory import constants
from eotattn.priors.prior_positions import check_positions, pair_positions, position_lookup
from eotattn.priors.reading import Reading, Tokens, join_readings
from eotattn.priors.terms import BIAS_TERM, KeyTerm, Term, computing_dtype

__all__ = [
    "CombinedPrior",
    "HeadsPrior",
    "LogPrior",
    "ScaledPrior",
    "ScoreMod",
    "SumPrior",
    "check_prior",
    "checked_parts",
    "read_each",
]

#: Number formats that lanes can be written in.
KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LogPrior(nn.Module):
    """A log-prior over keys for every head and query: attention is softmax(score + log_prior).

    A subclass writes :meth:`log_prior` and :meth:`reset_parameters`; its dense form and its FlexAttention form follow.
    A prior that is a finite inner product of a query feature and a key feature derives from
    :class:`~eotattn.priors.BilinearPrior` instead, and any fused kernel carries it. Parameters keep their dtype
    whatever dtype the surrounding model is cast to. Constants are plain attributes set by the constructor.

    Args:
        num_heads: Number of query heads H.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> RecencyPrior(1).dense(torch.arange(3), torch.arange(3))
        tensor([[[ 0.0000,  0.0039,  0.0078],
                 [-0.0039,  0.0000,  0.0039],
                 [-0.0078, -0.0039,  0.0000]]], grad_fn=<ToCopyBackward0>)
    """

    #: Numbers that make a position: 1 on a sequence, 2 on a grid.
    num_coordinates: int = 1
    #: Whether the log-prior depends on differences of positions only.
    is_relative: bool = False
    #: Whether :meth:`read_tokens` gives a bias of keys, which takes lanes of its own.
    biases_keys: bool = False
    #: Numbers N that are kept of every token, where later chunks go on from them.
    num_kept: int = 0
    #: Samples that the log-prior is given for, each its own; ``None`` where it is one for all.
    num_samples: int | None = None

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = check_positive_int(type(self).__name__, "num_heads", num_heads)

    @abstractmethod
    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior of one (head, query position, key position), in nats, elementwise.

        Args:
            head: Integer tensor, broadcastable with the positions.
            query_position: Floating tensor, tokens; on grids with a trailing axis of C coordinates.
            key_position: The same for the key.

        Returns:
            Tensor of the broadcast shape. Computation is in the dtype of the positions.
        """
        raise NotImplementedError

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The log-prior as a sum of bilinear terms, which lanes can carry.

        Raises:
            NotImplementedError: If the prior is no finite inner product.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.lanes: this prior is not a finite inner product of query and key features. "
            f"Use backend='reference' or 'flex', or a prior with lanes."
        )

    @property
    def has_lanes(self) -> bool:
        """Whether the prior is a finite inner product, so that any fused kernel can carry it."""
        return type(self).terms is not LogPrior.terms

    def far_form(self) -> FarForm | None:
        """What the log-prior is far away, if it is simpler there: a constant a head, or a prior with lanes."""
        tail = Tail(prior=self)
        return FarForm(0, tail, tail) if self.has_lanes and self.num_coordinates == 1 else None

    @property
    def reads_tokens(self) -> bool:
        """Whether the log-prior depends on more than positions, so that layers call :meth:`read_tokens`."""
        return type(self).read_tokens is not LogPrior.read_tokens

    def read_tokens(self, tokens: Tokens) -> Reading:
        """What the tokens add to the log-prior of their positions, which every other method states; here nothing."""
        return Reading()

    def dense(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The log-prior of every pair: the truth that other forms are measured against.

        Args:
            query_positions: (Q,) or (B, Q), tokens; with a trailing axis C on grids.
            key_positions: (K,) or (B, K), likewise.
            dtype: float32 or float64. Features of positions are always computed in float64.

        Returns:
            (H, Q, K), or (B, H, Q, K) where a position has a batch axis, in nats.

        Raises:
            ValueError: If the positions are empty or of the wrong shape.
        """
        self.check_positions(query_positions, key_positions)
        query, key = pair_positions(query_positions, key_positions, self.num_coordinates)
        head = torch.arange(self.num_heads, device=query.device)[:, None, None]
        return self.log_prior(head, query, key).to(computing_dtype(dtype))

    def score_mod(self, query_positions: Tensor | None = None, key_positions: Tensor | None = None) -> ScoreMod:
        """The FlexAttention form: a function (score, batch, head, query_index, key_index) -> score + log_prior.

        Args:
            query_positions: Positions of the queries as in :meth:`dense`; by default the index itself.
            key_positions: Positions of the keys, likewise.
        """
        if query_positions is not None and key_positions is not None:
            self.check_positions(query_positions, key_positions)
            if self.has_lanes:
                return score_mod_of(self.terms(), query_positions, key_positions)
        elif self.num_coordinates > 1:
            self.check_positions(query_positions, key_positions)
        query_at = position_lookup(query_positions, self.num_coordinates)
        key_at = position_lookup(key_positions, self.num_coordinates)

        def modified(score: Tensor, batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
            log_prior = self.log_prior(head, query_at(batch, query_index), key_at(batch, key_index))
            return score + log_prior.to(score.dtype)

        return modified

    def num_lanes(
        self, dtype: torch.dtype = torch.float32, num_kv_heads: int | None = None, tolerance: float | None = None
    ) -> int:
        """Number of lanes P that the prior occupies in a kernel of ``dtype``, at positions below 65 536.

        Args:
            dtype: The kernel's dtype.
            num_kv_heads: Key heads, by default H; fewer need more lanes where key lanes differ between query heads.
            tolerance: As in :meth:`lanes`.
        """
        terms = (*self.terms(), BIAS_TERM) if self.biases_keys else self.terms()
        return plan_lanes(terms, self._lane_request(dtype, num_kv_heads, tolerance)).num_lanes

    def lanes(
        self,
        query_positions: Tensor,
        key_positions: Tensor,
        *,
        dtype: torch.dtype,
        num_kv_heads: int | None = None,
        tolerance: float | None = None,
        query_scale: float = 1.0,
    ) -> Lanes:
        """Query and key lanes whose inner product is the log-prior up to a constant of each row.

        Args:
            query_positions: (Q,) or (B, Q), tokens; with a trailing axis C on grids.
            key_positions: (K,) or (B, K), likewise.
            dtype: The kernel's dtype.
            num_kv_heads: Key heads Hk, by default H. Query heads that share a key head read lanes of their own.
            tolerance: Error that the lanes may add, nats, which decides how many numbers of ``dtype`` a factor is
                split into; by default about what the rounding of content in ``dtype`` costs anyway.
            query_scale: Factor on the inner product, applied before rounding; kernels that multiply by ``scale`` need
                its inverse here.

        Returns:
            :class:`Lanes` with query (..., H, Q, P), key (..., 1 or Hk, K, P) and ``error_bound`` in nats.

        Raises:
            NotImplementedError: If the prior has no lanes.
            ValueError: For positions, heads, tolerances or scales that do not fit.
            TypeError: For a dtype that no kernel has.
        """
        self.check_positions(query_positions, key_positions)
        request = self._lane_request(dtype, num_kv_heads, tolerance, query_scale)
        return make_lanes(self.terms(), query_positions, key_positions, request)

    def _lane_request(
        self, dtype: torch.dtype, num_kv_heads: int | None, tolerance: float | None, query_scale: float = 1.0
    ) -> LaneRequest:
        """What lanes are made for; raises unless they can be."""
        owner = type(self).__name__
        known, remedy = dtype in KERNEL_DTYPES, "Pass one of them"
        require(known, owner, "dtype", f"be one of {KERNEL_DTYPES}", dtype, remedy, error=TypeError)
        heads = self.num_heads if num_kv_heads is None else num_kv_heads
        check_positive_int(owner, "num_kv_heads", heads)
        remedy = "Pass the number of key heads"
        require(self.num_heads % heads == 0, owner, "num_kv_heads", f"divide {self.num_heads}", heads, remedy)
        if tolerance is not None:
            check_positive(owner, "tolerance", tolerance)
        check_positive(owner, "query_scale", query_scale)
        return LaneRequest(
            self.num_heads,
            heads,
            dtype,
            num_coordinates=self.num_coordinates,
            tolerance=tolerance,
            query_scale=float(query_scale),
        )

    def reset_parameters(self) -> None:
        """Put parameters back to their start (also after ``to_empty`` on a meta-device module)."""

    def freeze(self) -> LogPrior:
        """Stop training this prior; returns the prior itself."""
        self.requires_grad_(False)
        return self

    def heads(self, chosen: Sequence[int]) -> LogPrior:
        """The same log-prior of some heads, in the order given: what a process that has those heads needs."""
        return HeadsPrior(self, chosen)

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless both are positions that this prior understands."""
        for name, positions in (("query_positions", query_positions), ("key_positions", key_positions)):
            check_positions(type(self).__name__, name, positions, self.num_coordinates)

    def __add__(self, other: LogPrior) -> LogPrior:
        return SumPrior(self, other) if isinstance(other, LogPrior) else NotImplemented

    def __radd__(self, other: object) -> LogPrior:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # so that sum() works

    def __mul__(self, factor: float | Sequence[float]) -> LogPrior:
        return ScaledPrior(self, factor) if isinstance(factor, (int, float, tuple, list)) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LogPrior:
        if not isinstance(divisor, (int, float)):
            return NotImplemented
        require(divisor != 0, type(self).__name__, "divisor", "not be zero", divisor, "Multiply by a finite number")
        return self * (1 / divisor)

    def __neg__(self) -> LogPrior:
        return self * -1.0

    def extra_repr(self) -> str:
        """Heads, what else the constructor was given and keeps as a number or word, and the shapes of what is learned.

        Example:
            >>> from eotattn.priors import RelativeBiasPrior
            >>> RelativeBiasPrior(2, max_lag=3)
            RelativeBiasPrior(num_heads=2, max_lag=3, table=(2, 7))
        """
        given = (name for name in inspect.signature(type(self)).parameters if name != "num_heads")
        kept = {name: getattr(self, name, None) for name in given}
        shown = {name: value for name, value in kept.items() if isinstance(value, (int, float, str))}
        shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters(recurse=False)}
        return ", ".join(
            f"{name}={value!r}" for name, value in ({"num_heads": self.num_heads} | shown | shapes).items()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but keep the dtype of parameters and buffers."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class CombinedPrior(LogPrior):
    """A prior made of others: it checks positions and resets as they do, and has lanes where they have them."""

    def __init__(self, parts: Sequence[LogPrior], num_heads: int) -> None:
        super().__init__(num_heads)
        self.num_coordinates = parts[0].num_coordinates
        self.is_relative = all(part.is_relative for part in parts)
        self.biases_keys = any(part.biases_keys for part in parts)
        self.num_kept = sum(part.num_kept for part in parts)
        samples = {part.num_samples for part in parts} - {None}
        agree, owner = len(samples) < 2, type(self).__name__
        require(agree, owner, "parts", "be for equally many samples", tuple(samples), "Rebuild one of them")
        self.num_samples = next(iter(samples), None)
        self.parts = cast("Sequence[LogPrior]", nn.ModuleList(parts))

    @property
    def has_lanes(self) -> bool:
        """Whether every part has lanes."""
        for part in listed(self, "parts"):  # noqa: SIM110
            if not part.has_lanes:
                return False
        return True

    @property
    def reads_tokens(self) -> bool:
        """Whether a part reads the tokens."""
        for part in listed(self, "parts"):  # noqa: SIM110
            if part.reads_tokens:
                return True
        return False

    def read_tokens(self, tokens: Tokens) -> Reading:
        """What the parts read.

        Raises:
            NotImplementedError: If the combination has no meaning for what they read.
        """
        name = type(self).__name__
        raise NotImplementedError(
            f"{name}.read_tokens: parts must read positions alone. Add what reads the tokens to {name}."
        )

    def check_positions(self, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
        """Raise unless every part understands both positions."""
        for part in self.parts:
            part.check_positions(query_positions, key_positions)

    def reset_parameters(self) -> None:
        """Reset every part."""
        for part in self.parts:
            part.reset_parameters()


def checked_parts(owner: str, parts: Iterable[object]) -> list[LogPrior]:
    """Priors on positions of one kind."""
    checked = list(parts)
    require(len(checked) > 0, owner, "parts", "hold at least one prior", checked, "Pass the priors to combine")
    for part in checked:
        check_prior(owner, "parts", part)
    priors = cast("list[LogPrior]", checked)
    coordinates = [part.num_coordinates for part in priors]
    rule = "agree in num_coordinates"
    require(len(set(coordinates)) == 1, owner, "parts", rule, tuple(coordinates), "Rebuild one of them")
    return priors


def read_each(parts: Sequence[LogPrior], tokens: Tokens) -> list[Reading]:
    """What each prior reads, going on from its own share of what was kept."""
    readings, start = [], 0
    for part in parts:
        before = None if tokens.before is None else tokens.before[:, start : start + part.num_kept]
        readings.append(part.read_tokens(tokens._replace(before=before)))
        start += part.num_kept
    if any(reading.query_gains for reading in readings):
        without = [type(part).__name__ for part in parts if not part.has_lanes]
        if without:
            raise NotImplementedError(
                f"QueryGainPrior: priors beside it must have lanes; got {', '.join(without)}. "
                f"Put them into layers of their own."
            )
        counted = zip(parts, readings, strict=True)
        readings = [
            reading if reading.query_gains else reading._replace(query_gains=(None,) * len(part.terms()))
            for part, reading in counted
        ]
    return readings


class SumPrior(CombinedPrior):
    """The sum of log-priors, i.e. the product of priors. Written ``a + b``; nested sums are flattened.

    Args:
        parts: At least one prior; all with the same number of heads and coordinates.

    Attributes:
        parts: The summands, in order.

    Example:
        >>> from eotattn.priors import RecencyPrior, SinkPrior
        >>> len((RecencyPrior(2) + SinkPrior(2) + SinkPrior(2)).parts)
        3
    """

    def __init__(self, *parts: LogPrior) -> None:
        checked = checked_parts("SumPrior", parts)
        flat = [leaf for part in checked for leaf in (part.parts if isinstance(part, SumPrior) else [part])]
        heads = tuple(part.num_heads for part in flat)
        require(len(set(heads)) == 1, "SumPrior", "parts", "agree in num_heads", heads, "Rebuild one of them")
        super().__init__(flat, flat[0].num_heads)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The sum of the parts, in nats."""
        return reduce(operator.add, [part.log_prior(head, query_position, key_position) for part in self.parts])

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of all parts."""
        terms: list[Term | KeyTerm] = []
        for part in listed(self, "parts"):
            terms += part.terms()
        return tuple(terms)

    def far_form(self) -> FarForm | None:
        """The sum of the parts' forms."""
        forms = [part.far_form() for part in self.parts]
        known = [form for form in forms if form is not None]
        return reduce(operator.add, known) if len(known) == len(forms) else None

    def read_tokens(self, tokens: Tokens) -> Reading:
        """The sum of what the parts read."""
        return join_readings(read_each(self.parts, tokens))

    def dense(self, query_positions: Tensor, key_positions: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum of the dense parts, in float64 before it is rounded."""
        parts = [part.dense(query_positions, key_positions, dtype=torch.float64) for part in self.parts]
        return reduce(operator.add, parts).to(computing_dtype(dtype))

    def score_mod(self, query_positions: Tensor | None = None, key_positions: Tensor | None = None) -> ScoreMod:
        """The score modifications of the parts, one after the other."""
        each = [part.score_mod(query_positions, key_positions) for part in self.parts]

        def modified(score: Tensor, *index: Tensor) -> Tensor:
            for modify in each:
                score = modify(score, *index)
            return score

        return modified


class ScaledPrior(CombinedPrior):
    """A prior times a number, or one a head. Written ``0.5 * prior``.

    Heads whose factor is zero are without the prior: ``prior * (1.0, 1.0, 0.0)`` leaves the third head uniform. A key
    that the prior makes inadmissible (-inf) stays so, whatever the factor.

    Args:
        prior: The prior to scale; stays trainable.
        factor: Finite, dimensionless; or H of them.
        learnable: Whether the factors train too. Fixed ones are constants of the constructor, in no state dict.

    Attributes:
        factor: The factors: H floats, or an (H,) parameter.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> (0.5 * RecencyPrior(8)).dense(torch.tensor([1]), torch.tensor([0]))[0].item()
        -0.25
    """

    factor: tuple[float, ...] | nn.Parameter

    def __init__(self, prior: LogPrior, factor: float | Sequence[float], *, learnable: bool = False) -> None:
        check_prior("ScaledPrior", "prior", prior)
        super().__init__([prior], prior.num_heads)
        numbers = [factor] * self.num_heads if isinstance(factor, (int, float)) else factor
        finite = all(isinstance(number, (int, float)) and abs(number) < float("inf") for number in numbers)
        good, rule = finite and len(numbers) == self.num_heads, f"be a finite number, or {self.num_heads} of them"
        require(good, "ScaledPrior", "factor", rule, factor, "Pass Python floats")
        self._start = tuple(float(number) for number in numbers)
        self.factor = nn.Parameter(torch.tensor(self._start, dtype=torch.float32)) if learnable else self._start

    @property
    def prior(self) -> LogPrior:
        """The prior that is scaled."""
        return self.parts[0]

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The scaled log-prior, in nats."""
        value = self.prior.log_prior(head, query_position, key_position)
        hidden = value == float("-inf")  # times zero it would be NaN, times -1 a sole key, and so the factor's gradient
        return torch.where(hidden, value, self._factors(value)[head] * value.masked_fill(hidden, 0.0))

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of the prior with their weights scaled."""
        factors, scaled = self.factor, []
        for part in listed(self, "parts"):
            for term in part.terms():
                change = term.weighted(self._scale) if isinstance(factors, Tensor) else term.scaled(factors)
                scaled.append(change)
        return tuple(scaled)

    def far_form(self) -> FarForm | None:
        """The prior's form, scaled."""
        form = self.prior.far_form()
        scale = lambda numbers: self._factors(numbers.double()).unsqueeze(1) * numbers  # noqa: E731
        return None if form is None else form.changed(self._like, scale)

    def read_tokens(self, tokens: Tokens) -> Reading:
        """What the prior reads, its biases scaled."""
        return self.prior.read_tokens(tokens).of_heads(self.num_heads).weighted(self._scale)

    def reset_parameters(self) -> None:
        """Reset the prior, and learnable factors to those given at construction."""
        super().reset_parameters()
        if isinstance(self.factor, nn.Parameter):
            with torch.no_grad():
                self.factor.copy_(torch.tensor(self._start))

    def extra_repr(self) -> str:
        """Heads, and the factor or those of the heads."""
        if isinstance(self.factor, nn.Parameter):
            return super().extra_repr()
        return f"{super().extra_repr()}, factor={self.factor[0] if len(set(self.factor)) == 1 else self.factor}"

    def _like(self, prior: LogPrior) -> ScaledPrior:
        """Another prior with the same factors."""
        scaled = ScaledPrior(prior, self._start)
        scaled.factor = self.factor
        return scaled

    def _factors(self, like: Tensor) -> Tensor:
        """(H,) in the dtype of ``like``."""
        factor = self.factor
        return factor.to(like.dtype) if isinstance(factor, Tensor) else constants(factor, like.device, like.dtype)

    def _scale(self, weights: Tensor) -> Tensor:
        weights = weights.double()
        return self._factors(weights)[:, None, None] * weights


class HeadsPrior(CombinedPrior):
    """Some heads of a prior, in any order, also several times: one log-prior for eight heads is ``[0] * 8`` of it.

    Args:
        prior: The prior to choose from; stays trainable.
        chosen: Head of ``prior`` for each head of this one, from 0 to its number of heads - 1.

    Example:
        >>> from eotattn.priors import FourierPrior
        >>> prior = HeadsPrior(FourierPrior(1, num_frequencies=4), [0] * 8)
        >>> prior.num_heads, sum(parameter.numel() for parameter in prior.parameters())
        (8, 8)
    """

    def __init__(self, prior: LogPrior, chosen: Sequence[int]) -> None:
        check_prior("HeadsPrior", "prior", prior)
        chosen = tuple(chosen)
        known = len(chosen) > 0 and all(type(head) is int and 0 <= head < prior.num_heads for head in chosen)
        rule = f"name heads from 0 to {prior.num_heads - 1}"
        require(known, "HeadsPrior", "chosen", rule, chosen, "Choose heads that the prior has")
        super().__init__([prior], len(chosen))
        self.chosen = chosen

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """The log-prior of the chosen head, in nats."""
        index = constants(self.chosen, head.device, torch.int64)[head]
        return self.parts[0].log_prior(index, query_position, key_position)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """The terms of the prior with the weights of the chosen heads."""
        return tuple([term.weighted(self._choose) for term in self.parts[0].terms()])

    def far_form(self) -> FarForm | None:
        """The prior's form, of the chosen heads."""
        form, chosen = self.parts[0].far_form(), list(self.chosen)
        if form is None:
            return None
        return form.changed(lambda prior: HeadsPrior(prior, chosen), lambda numbers: numbers[chosen])

    def read_tokens(self, tokens: Tokens) -> Reading:
        """What the chosen heads read."""
        prior = self.parts[0]
        return prior.read_tokens(tokens).of_heads(prior.num_heads).weighted(self._choose).with_gains(self._choose)

    def _choose(self, weights: Tensor) -> Tensor:
        return weights.index_select(-3, constants(self.chosen, weights.device, torch.int64))


def check_prior(owner: str, argument: str, value: object) -> None:
    """Raise unless ``value`` is a :class:`LogPrior`."""
    if isinstance(value, LogPrior):
        return
    remedy = "See eotattn.priors"
    if isinstance(value, Tensor):
        remedy = "Wrap numbers: DensePrior(log_prior)"
    elif callable(value) and not isinstance(value, nn.Module):
        remedy = f"Call it: {getattr(value, '__name__', 'it')}(num_heads)"
    fail(owner, argument, "be a LogPrior", value, remedy, error=TypeError)
