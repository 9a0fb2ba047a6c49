"""StoredLanes: what stands beside the stored keys of a cache, so that a step writes one row and attends to views.

Legend: B batch, H query heads, Hk key heads, S slots, n slots of a writing, D key width, W kernel width, P lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eotattn.attention.call_positions import static_size
from eotattn.attention.slots import Slots
from eotattn.attention.token_bias import is_learned, key_bias_term
from eotattn.kernels import sdpa
from eotattn.kernels.append import append_one
from eotattn.kernels.sdpa import WIDTH_STEP
from eotattn.priors import LogPrior
from eotattn.priors.lane_plan import LanePlan, LaneRequest, plan_lanes
from eotattn.priors.probing import Span, bits_of
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["StoredLanes"]


class StoredLanes:
    """The lanes beside the keys of a :class:`KeyValueCache`: features of positions, biases of tokens, marks of padding.

    What is learned is not among them; it enters with the queries of each step.
    """

    prior: LogPrior | None
    key_width: int
    max_length: int
    first_position: int
    _keys: Slots
    _values: Slots
    _positions: Tensor
    _padding: Tensor
    _has_padding: bool
    _key_bias: Tensor | None
    _query_table: Tensor | None
    _plan: LanePlan | None
    _origin: int

    @property
    def scale(self) -> float:
        """The scale that lanes are made for, 1 / sqrt(D); in graphs a number, not a symbol, whatever the widths."""
        return 1 / math.sqrt(static_size(self.key_width))

    def stored_plan(self, call: Any) -> tuple[LanePlan, int] | None:
        """The lanes beside the stored keys and the origin that they count from, where they serve the call."""
        return None if self._plan is None or not self._serves(call) else (self._plan, self._origin)

    @property
    def _hides_slots(self) -> bool:
        """Whether a lane hides some of the slots attended to."""
        return self._has_padding

    def _slots_of(self, count: int) -> Tensor:
        """Room for ``count`` numbers a token, (B, count, S) float64."""
        with torch.inference_mode(False):
            shape = (self._values.shape[0], count, self.max_length)
            return torch.zeros(shape, dtype=torch.float64, device=self._values.device)

    def _set_bias(self, heads: int) -> None:
        self._key_bias = self._slots_of(heads) if heads else None
        self._plan = self._plan_lanes()
        self._query_table = None
        self._widen()
        self._write_lanes(0)

    @property
    def _bias_heads(self) -> int:
        return 0 if self._key_bias is None else self._key_bias.shape[1]

    def _terms(self, bias: Tensor | None = None) -> tuple[Term | KeyTerm, ...]:
        """The terms of the log-prior, with the ``bias`` of some slots, by default of all."""
        terms = () if self.prior is None else self.prior.terms()
        bias = self._key_bias if bias is None else bias
        return terms if bias is None else (*terms, key_bias_term(bias, self._num_heads, self._keys.shape[1]))

    @property
    def _num_heads(self) -> int:
        return max(self._bias_heads, self._keys.shape[1]) if self.prior is None else self.prior.num_heads

    def _plan_lanes(self) -> LanePlan | None:
        """The lanes that stored keys have beside their content."""
        prior = self.prior
        if prior is not None and (not prior.has_lanes or prior.num_coordinates > 1):
            return None
        if prior is not None and any(isinstance(term, KeyTerm) for term in prior.terms()):
            return None  # numbers of keys that are learned, and may change
        terms, last = self._terms(), self.first_position + self.max_length
        if not terms:
            return None
        request = LaneRequest(
            num_heads=self._num_heads,
            num_kv_heads=self._keys.shape[1],
            dtype=self._keys.dtype,
            span=Span(bits_of(max(last, -self.first_position)), bits_of(self.max_length // 2)),
            query_scale=1 / self.scale,
            has_fixed_keys=True,
        )
        return plan_lanes(terms, request)

    def _serves(self, call: Any) -> bool:
        """Whether what is stored is right for a call."""
        if call.prior is not self.prior or call.query.dtype != self._keys.dtype or call.masks.key_bias is not None:
            return False
        if self.prior is None and self._plan is None:
            return not self._hides_slots or math.isclose(call.scale, self.scale)
        if self._plan is None or not math.isclose(call.scale, self.scale):
            return False
        if not torch.is_grad_enabled():
            return True
        numbers = [] if self.prior is None else self.prior.parameters()
        return not any(map(is_learned, (call.query_bias, *call.query_gains, *numbers)))

    def _widen(self) -> None:
        """Make room for lanes and for the lane that hides slots, and on a CPU for values as wide as keys."""
        beside = self._num_lanes + self._hides_slots
        width = self.key_width + beside
        if beside and self._keys.device.type == "cuda":
            width = -(-width // WIDTH_STEP) * WIDTH_STEP
        with torch.inference_mode(False):
            self._keys.widen(width)
            if self._values.device.type == "cpu":  # the fused kernel there wants equal widths
                self._values.widen(width)

    @property
    def _num_lanes(self) -> int:
        return 0 if self._plan is None else self._plan.num_lanes

    @torch.no_grad()
    def _write_lanes(self, start: int) -> None:
        """Write what stands beside the keys from slot ``start`` on: features of positions, and marks of hidden ones."""
        beside, dtype = self._keys.beside[:, :, start:], self._keys.dtype
        if self._plan is not None:
            table = self._plan.table("key", self._slot_positions()[..., start:], self._origin)
            lanes = self._plan.sides(self._terms(), (table, table))[1].lanes(dtype)
            beside[..., : lanes.shape[-1]] = lanes
        if self._hides_slots:
            far = sdpa.far_lane(dtype, scale=self.scale)
            beside[..., self._num_lanes] = (far * self._hidden(start)).to(dtype).unsqueeze(1)

    def _hidden(self, start: int) -> Tensor:
        """(B, n) which slots from ``start`` on nothing attends to."""
        return self._padding[:, start:]

    @torch.no_grad()
    def _bias_lanes(self, at: slice | Tensor, bias: Tensor) -> Tensor:
        """(B, Hk, n, P) the lanes of the bias (B, heads, n) of the slots ``at``, the last of all lanes; P may be 0."""
        lanes = None
        if self._plan is not None:
            lanes = self._plan.more_of_keys(self._terms(bias), self._slot_positions()[..., at])
        return self._keys.beside.new_empty((*self._keys.shape[:2], bias.shape[-1], 0)) if lanes is None else lanes

    def _beside(self, query: Tensor, at: slice | Tensor, gains: Sequence[Tensor | None]) -> Tensor:
        """Queries (B, H, Q, D) of the slots ``at`` with their lanes, (B, H, Q, W)."""
        side = far = None
        if self._plan is not None:
            plan = self._plan
            if self._query_table is None:
                self._query_table = plan.table("query", self._slot_positions(), self._origin)
            rows = self._query_table[..., at, :]
            side = plan.with_gains(plan.sides(self._terms(), (rows, rows))[0], gains)
        if self._hides_slots:
            mark = torch.ones(1, 1, dtype=torch.bool, device=query.device)
            far = sdpa.padding_lane(mark, query.dtype, scale=self.scale)[0]
        return append_one(query, side, far, width=self._keys.width)

    def _slot_positions(self) -> Tensor:
        return self._positions if self._has_padding else self._positions[0]
