"""Fused calls at one temperature: everything that does not depend on the potential is prepared once."""

# Legend: n queries, m keys, d content width, w operand width; the leading dimensions (...) are a batch.

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eotattn.kernels.log_sum_exp import attend, biased_log_sum_exp
from eotattn.priors.terms import computing_dtype
from eotattn.transport.problems.affinity import Number, plus
from eotattn.transport.problems.prior_factors import PriorFactors

__all__ = ["FusedCalls"]

#: What a removed key adds to a logit in lanes, nats: finite, since kernels multiply lanes, and below any real logit.
_FAR = -1e9


@dataclass(frozen=True, eq=False)
class FusedCalls:
    """Log-sum-exps and averages over ``(<query_i, key_j> + potential_j) / epsilon``, one potential after another."""

    query: Tensor  # content and lanes of the log-prior, (..., n, w), the kernel's dtype
    key: Tensor  # the same for keys, (..., m, w)
    constant: Tensor | None  # what every key adds to its logits, nats, (..., m); -inf removes it
    epsilon: Number  # cost units
    scale: float  # what the kernel multiplies inner products by; the rest of 1 / epsilon is in the query
    direction: int = 0  # 1 where query i may use keys 0 to i, -1 where keys i to m, else 0

    @classmethod
    def prepare(
        cls,
        query: Tensor,
        key: Tensor,
        factors: tuple[PriorFactors, ...],
        *,
        epsilon: Number,
        key_bias: Tensor | None = None,
        key_log_prior: Tensor | None = None,
        key_padding: Tensor | None = None,
        direction: int = 0,
    ) -> FusedCalls:
        """Lay content and the lanes of ``factors`` side by side, and join what biases keys."""
        if isinstance(epsilon, Tensor):
            query, scale = query / epsilon[..., None], 1.0
        else:
            scale = 1.0 / epsilon
        pairs = [(query, key)]
        if factors:
            pairs += [part.split(query.dtype, query_scale=1.0 / scale) for part in factors]
        left, right = (_beside(side) for side in zip(*pairs, strict=True))
        parts = [] if key_bias is None else [key_bias / epsilon]
        parts += [] if key_log_prior is None else [key_log_prior]
        if key_padding is not None:
            kept = torch.zeros(key_padding.shape, dtype=computing_dtype(query.dtype), device=key.device)
            parts.append(kept.masked_fill(key_padding, -math.inf))
        constant = sum(parts[1:], start=parts[0]) if parts else None
        return cls(left, right, constant, epsilon, scale, direction)

    def log_sum_exp(self, bias: Tensor) -> Tensor:
        """Log-sum-exp over the keys, nats, shape (..., n), -inf where no key is left; ``bias`` of shape (..., m)."""
        found = self._by_its_own_kernel(bias)
        return self._attend(bias, None)[1] if found is None else found

    def average(self, potential: Tensor, value: Tensor) -> Tensor:
        """Softmax average of values (..., m, v), shape (..., n, v), the kernel's dtype; zero where no key is left."""
        output, log_sum_exp = self._attend(self.bias(potential), value)
        return output.masked_fill((log_sum_exp == -math.inf)[..., None], 0.0)

    def bias(self, potential: Tensor) -> Tensor:
        """Potential and constant in nats, -inf where a key is removed; a potential of +inf counts as zero.

        A query that neither sends mass nor has keys has no potential at all (-inf + inf), and is removed too.
        """
        potential = potential.nan_to_num(nan=-math.inf, posinf=0.0, neginf=-math.inf)
        return potential / self.epsilon if self.constant is None else plus(self.constant, potential, 1 / self.epsilon)

    @cached_property
    def _lead(self) -> torch.Size:
        return torch.broadcast_shapes(self.query.shape[:-2], self.key.shape[:-2])

    def _batch(self, bias: Tensor) -> torch.Size:
        return self._lead if bias.shape[:-1] == self._lead else torch.broadcast_shapes(self._lead, bias.shape[:-1])

    def _by_its_own_kernel(self, bias: Tensor) -> Tensor | None:
        """The log-sum-exp by the kernel that computes nothing else, or ``None`` where it does not serve."""
        if self.direction or self.query.device.type != "cuda":
            return None
        batch = self._batch(bias)
        count = math.prod(batch)
        query, key = (
            side.expand(*batch, *side.shape[-2:]).reshape(count, *side.shape[-2:]) for side in (self.query, self.key)
        )
        bias = bias.expand(*batch, bias.shape[-1]).reshape(count, bias.shape[-1])
        found = biased_log_sum_exp(query, key, bias, scale=self.scale)
        return None if found is None else found.reshape(*batch, query.shape[-2])

    def _attend(self, bias: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        """One attention call with the bias in lanes: output (..., n, v) and log-sum-exp (..., n)."""
        batch = self._batch(bias)
        batch = batch if value is None else torch.broadcast_shapes(batch, value.shape[:-2])
        lane = bias.clamp(min=_FAR) / self.scale
        carrier = PriorFactors(lane.new_ones(1, 1), lane[..., None], exact="query").split(self.query.dtype)
        query, key = (_beside(pair) for pair in ((self.query, carrier[0]), (self.key, carrier[1])))
        operands = [query, key] if value is None else [query, key, value.to(query.dtype)]
        operands = [one.expand(*batch, *one.shape[-2:]).reshape(-1, 1, *one.shape[-2:]) for one in operands]
        if self.direction < 0:
            operands = [one.flip(-2) for one in operands]
        output, log_sum_exp = attend(*operands, scale=self.scale, is_causal=self.direction != 0)
        if self.direction < 0:
            output, log_sum_exp = output.flip(-2), log_sum_exp.flip(-1)
        log_sum_exp = torch.where(log_sum_exp < 0.5 * _FAR, -math.inf, log_sum_exp)
        n = query.shape[-2]
        return output.reshape(*batch, n, output.shape[-1]), log_sum_exp.reshape(*batch, n)


def _beside(tensors: tuple[Tensor, ...]) -> Tensor:
    """Concatenate along the last axis after broadcasting the others; one tensor is itself."""
    if len(tensors) == 1:
        return tensors[0]
    shape = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
    return torch.cat([tensor.expand(*shape, tensor.shape[-1]) for tensor in tensors], dim=-1)
