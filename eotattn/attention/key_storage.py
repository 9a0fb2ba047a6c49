"""KeyStorage: the keys of a cache with the prior's lanes beside them, as a fused kernel wants them.

Legend: B batch, H query heads, Hk key heads, S slots, Q queries, D key width, P lanes, W kernel width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.kernels import sdpa
from eotattn.priors import LogPrior
from eotattn.priors.positions import may_remember

__all__ = ["KeyStorage"]

#: Slots for which lanes are made ahead, so that a decoding step makes none.
AHEAD = 256


class KeyStorage:
    """Keys (B, Hk, S, W): content, lanes of the key's position, and one lane that is far below any score on padding.

    The lanes of a key depend on its position, which never changes while the key is there, and on the parameters of the
    prior, whose versions are watched: when one was written to, lanes are made again.

    Args:
        prior: Log-prior whose lanes are stored; a prior without lanes is left to others.
        shape: (B, Hk, S, D).
        dtype: Dtype of the keys.
        device: Their device.
    """

    def __init__(
        self,
        prior: LogPrior | None,
        shape: tuple[int, int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.prior, self.scale, self.content_width = prior, 1 / math.sqrt(shape[-1]), shape[-1]
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._num_lanes, self._marks_padding = 0, False
        if prior is not None and prior.has_lanes and prior.num_coordinates == 1:
            zero = torch.zeros(1, dtype=torch.int64, device=self.tensor.device)
            self._num_lanes = self._make(zero, zero)[1].shape[-1]
        self._widen()
        modules = [] if prior is None else prior.modules()
        self._held = [held for module in modules for held in (module._parameters, module._buffers) if held]
        self._num_ready, self._stamp = 0, self._versions()
        self._query_first, self._query_lanes = 0, self.tensor.new_zeros(0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyStorage:
        twin = copy(self)  # for the same prior, whose parameters are the layer's
        twin.tensor = self.tensor.clone()
        return twin

    @property
    def content(self) -> Tensor:
        """(B, Hk, S, D), a view."""
        return self.tensor[..., : self.content_width]

    def write(self, start: int, key: Tensor, padding: Tensor | None) -> None:
        """Put new keys (B, Hk, L, D) into the slots from ``start`` on; ``padding`` is (B, L), true on padding."""
        end = start + key.shape[2]
        self.tensor[:, :, start:end, : self.content_width] = key.detach()
        if padding is not None and not self._marks_padding:
            self._marks_padding = True
            self._widen()
        if self._marks_padding:
            far = sdpa.far_lane(self.tensor.dtype, scale=self.scale)
            mark = 0.0 if padding is None else (far * padding).to(self.tensor.dtype).unsqueeze(1)
            self.tensor[:, :, start:end, self.content_width + self._num_lanes] = mark

    def forget_lanes(self, start: int) -> None:
        """Make lanes again from slot ``start`` on: positions there are new."""
        self._num_ready = min(self._num_ready, start)
        self._query_lanes = self._query_lanes[..., :0, :]

    def serves(self, query: Tensor, prior: LogPrior | None, scale: float) -> bool:
        """Whether what is stored is right for a call: the same prior, scale and dtype, and no gradient of the prior."""
        if prior is not self.prior or query.dtype != self.tensor.dtype or not may_remember(query.device):
            return False
        if prior is None:
            return True
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in prior.parameters())
        return self._num_lanes > 0 and math.isclose(scale, self.scale) and not learns

    def lanes(self, positions: Callable[[], Tensor], start: int, end: int) -> Tensor:
        """Bring the lanes of keys up to date and give those of the queries in the slots from ``start`` to ``end``.

        Args:
            positions: Gives (S,) or (B, S), tokens, of filled slots and as expected of those to come.
            start: Slot of the first query.
            end: Slots filled.

        Returns:
            (B, H, Q, W - D).
        """
        if self._stamp != (stamp := self._versions()):
            self.forget_lanes(0)
            self._stamp = stamp
        at, known = start - self._query_first, self._query_lanes.shape[-2]
        if self._num_ready >= end and at >= 0 and end - self._query_first <= known:
            return self._query_lanes.narrow(-2, at, end - start)
        with torch.no_grad():
            return self._make_ahead(positions(), start, end)

    def _make_ahead(self, positions: Tensor, start: int, end: int) -> Tensor:
        stop, first = min(self.tensor.shape[2], end + AHEAD), positions[..., :1]
        if self._num_ready < stop and self._num_lanes > 0:
            columns = slice(self.content_width, self.content_width + self._num_lanes)
            ready = slice(self._num_ready, stop)
            self.tensor[:, :, ready, columns] = self._make(first, positions[..., ready])[1]
        self._num_ready = max(self._num_ready, stop)
        made = self._query_side(positions[..., start:stop], first)
        made = made.expand(self.tensor.shape[0], *made.shape[-3:])
        kept = end - start if end - start > AHEAD else 0  # a long prompt is not asked for again
        self._query_first, self._query_lanes = start + kept, made[..., kept:, :].clone()
        return made[..., : end - start, :]

    def _query_side(self, positions: Tensor, first: Tensor) -> Tensor:
        """What stands beside a query's content: lanes, the constant that meets the padding lane, zeros."""
        spare = self.tensor.shape[-1] - self.content_width - self._num_lanes
        if self._num_lanes > 0:
            made = functional.pad(self._make(positions, first)[0], (0, spare))
        else:
            made = self.tensor.new_zeros(1, positions.shape[-1], spare)
        if self._marks_padding:
            lift, _ = sdpa.padding_lane(torch.ones(1, 1, dtype=torch.bool), made.dtype, scale=self.scale)
            made[..., self._num_lanes] = float(lift)
        return made

    def _make(self, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        assert self.prior is not None
        dtype, num_kv_heads = self.tensor.dtype, self.tensor.shape[1]
        lanes = self.prior.lanes(query_positions, key_positions, dtype=dtype, query_scale=1 / self.scale)
        grouped = lanes.grouped(num_kv_heads)
        return grouped.query, grouped.key

    def _versions(self) -> list[int]:
        """What changes when a parameter or buffer of the prior is replaced, moved or written to."""
        found: list[int] = []
        for held in self._held:
            for tensor in held.values():
                if tensor is not None:
                    version = 0 if tensor.is_inference() else tensor._version
                    found += (id(tensor), tensor.data_ptr(), version)
        return found

    def _widen(self) -> None:
        """Make room for lanes and for the padding lane."""
        beside = self._num_lanes + self._marks_padding
        width = sdpa.kernel_width(self.content_width + beside, self.tensor.device) if beside else self.content_width
        if width > self.tensor.shape[-1]:
            with torch.inference_mode(False):
                self.tensor = functional.pad(self.tensor, (0, width - self.tensor.shape[-1]))
        self._query_lanes = self.tensor.new_zeros(0, 0)  # of another width
