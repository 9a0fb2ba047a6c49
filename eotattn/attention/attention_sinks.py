"""AttentionSinks: outcomes of the softmax that belong to no token, and that no prior, mask or position reaches.

Legend: B batch, H query heads, S heads of registers, Q queries, D key width, V value width, N registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.attention.merging import combine
from eotattn.checks import (
    check_floating,
    check_no_nan,
    check_positive_int,
    check_same_device,
    check_shape,
    fail,
    require,
)
from eotattn.priors.memory import is_plain

__all__ = ["AttentionSinks", "SinkKeys"]


@dataclass(frozen=True, eq=False)
class SinkKeys:
    """The sinks of one call.

    Args:
        logits: (H,) nats, one sink a head, without a value.
        has_zero_key: Whether there is a key and a value of zeros.
        key: (S, N, D) learned keys; S divides H.
        value: (S, N, V) their values, zero by default.
    """

    logits: Tensor | None = None
    has_zero_key: bool = False
    key: Tensor | None = None
    value: Tensor | None = None

    @classmethod
    def of(cls, owner: str, sinks: object) -> SinkKeys:
        """What a caller passes as ``sinks``: the module, or (H,) logits."""
        if isinstance(sinks, AttentionSinks):
            return cast("SinkKeys", sinks())  # called, so that hooks which gather or load parameters run
        if not isinstance(sinks, Tensor):
            rule = "be a tensor of one logit a head, or AttentionSinks"
            fail(owner, "sinks", rule, sinks, "Pass AttentionSinks.logit(num_heads)", error=TypeError)
        return cls(logits=sinks)

    def check(self, owner: str, query: Tensor, value: Tensor) -> None:
        """Raise unless they fit the content of a call."""
        (_, heads, _, width), value_width = query.shape, value.shape[-1]
        if self.logits is not None:
            check_floating(owner, "sinks", self.logits)
            check_shape(owner, "sinks", self.logits, (heads,), "One logit a query head")
        if self.key is not None:
            count, rule = self.key.shape[0], f"have registers of a number of heads that divides the query's {heads}"
            require(heads % count == 0, owner, "sinks", rule, count, "Build them for the key heads")
            check_shape(owner, "sinks (keys)", self.key, (None, None, width), "Build registers as wide as keys")
        if self.value is not None:
            check_shape(owner, "sinks (values)", self.value, (None, None, value_width), "Build them as wide as values")
        for part in (self.logits, self.key, self.value):
            check_same_device(owner, ("query", query), sinks=part)
            if part is not None and part.device.type == "cpu" and is_plain():
                check_no_nan(owner, "sinks", part, allow_negative_inf=part is self.logits)

    def without_values(self) -> SinkKeys:
        """The same sinks, which take weight and add nothing."""
        return replace(self, value=None)

    def log_sum_exp(self, query: Tensor, scale: float) -> Tensor:
        """Of their logits, (B or 1, H, Q or 1), nats, float32 or float64."""
        return self._logits(query, scale).logsumexp(-1)

    def join(
        self, output: Tensor, lse: Tensor, query: Tensor, *, scale: float, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let the sinks of a call take their share of its rows.

        Args:
            output: (B, H, Q, V), of the keys alone.
            lse: (B, H, Q) nats, of the keys alone.
            query: (B, H, Q, D).
            scale: Factor on the inner products.
            dropout_p: Probability of dropping the weight of a register.

        Returns:
            Output and log-sum-exp of keys and sinks together, and the share (B, H, Q) of the keys.
        """
        logits = self._logits(query, scale)
        own = logits.logsumexp(-1).expand(lse.shape)
        added = None
        if self.key is not None and self.value is not None:
            weights = logits.softmax(-1)[..., -self.key.shape[1] :]
            weights = functional.dropout(weights, dropout_p) if dropout_p else weights
            weights = weights.unflatten(1, (self.key.shape[0], -1))
            added = (weights @ self.value.to(weights.dtype).unsqueeze(1)).flatten(1, 2)
        joined, total, shares = combine((output, added), (lse, own))
        return joined.to(output.dtype), total, shares[0]

    def _logits(self, query: Tensor, scale: float) -> Tensor:
        """(B or 1, H, Q or 1, sinks), registers last."""
        dtype, parts = torch.promote_types(query.dtype, torch.float32), []
        if self.logits is not None:
            parts.append(self.logits.to(dtype)[None, :, None, None])
        if self.has_zero_key:
            parts.append(torch.zeros(1, query.shape[1], 1, 1, dtype=dtype, device=query.device))
        if self.key is not None:
            grouped = query.to(dtype).unflatten(1, (self.key.shape[0], -1))
            parts.append((scale * grouped @ self.key.to(dtype).mT.unsqueeze(1)).flatten(1, 2))
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], dim=-1)


class AttentionSinks(nn.Module):
    """Something to attend to instead of any token, so that a head can do nothing.

    A sink is a key outside of all positions: no prior, mask, window, document, padding or cache offset reaches it, and
    no cache holds it. Attention over keys and sinks is that over the keys alone, times exp(lse - logaddexp(lse, sink)),
    plus what sinks with a value add, whatever kernel served the keys. Returned weights are those of the keys: their
    rows sum to one less the sinks' mass. A query that sees no key has what its sinks give it.

    As transport: query i may leave a mass m_i of its row untransported. With scores s, prior pi, sink logit b and
    temperature one, the weights p_ij and m_i minimise, per row and with sum_j p_ij + m_i = 1,
    ``sum_j p_ij (ln(p_ij / pi_ij) - s_ij) + m_i (ln m_i - b)``: one-sided entropic transport with a dummy key, free as
    the others, that takes any mass at the price -b. ``TransportProblem`` states it with one more column. Given a
    marginal as well, that dummy key fixes how much the queries leave untransported in all: partial transport.

    In 16 bits the gradient that a trained recency slope has by way of the log-sum-exp is rounded relative to positions
    and not to lags: of normal content, its error over its signal was 0.15 at 2048 tokens and 0.45 at 4096 in bfloat16
    (0.03 and 0.01 without sinks; 4e-5 in float32). Backend ``"rebased"``, which counts from close by, brings it to 0.03
    at both; gradients of content, sinks and bounded priors are not touched.

    Kinds combine: ``AttentionSinks(has_zero_key=True, key=..., value=...)``. Numbers become parameters.

    Args:
        logits: (H,) nats: one sink a head, whatever the query, without a value.
        has_zero_key: Whether there is a key and a value of zeros: a logit of zero, "softmax off by one".
        key: (S, N, D): N learned keys (registers) for S heads, a divisor of the query heads, e.g. all key heads.
        value: (S, N, V): what they add; zero by default.

    Attributes:
        logits: Parameter, or ``None``.
        key: Parameter, or ``None``.
        value: Parameter, or ``None``.

    Source: logits, Agarwal et al. 2025 (gpt-oss, arXiv 2508.10925) and Xiao et al. 2023 (arXiv 2309.17453); registers,
    Darcet et al. 2023 (arXiv 2309.16588), and ``add_bias_kv`` and ``add_zero_attn`` of ``nn.MultiheadAttention``.

    Example:
        >>> from eotattn import prior_attention
        >>> x = torch.zeros(1, 2, 1, 4)
        >>> prior_attention(x, x, x + 1, sinks=AttentionSinks.zero_key())[0, 0]
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    def __init__(
        self,
        *,
        logits: Tensor | None = None,
        has_zero_key: bool = False,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        super().__init__()
        owner = "AttentionSinks"
        is_some = has_zero_key or not (logits is None and key is None and value is None)
        require(is_some, owner, "sinks", "be at least one", None, "Pass logits, has_zero_key or key")
        for name, tensor, axes in (("logits", logits, 1), ("key", key, 3), ("value", value, 3)):
            if tensor is not None:
                check_floating(owner, name, tensor)
                fits = tensor.dim() == axes and tensor.numel() > 0
                require(fits, owner, name, f"have {axes} axes and some entries", tensor, "See AttentionSinks")
        if value is not None:
            require(key is not None, owner, "value", "come with key", value, "Pass both")
            assert key is not None
            check_shape(owner, "value", value, (key.shape[0], key.shape[1], None), "One value a key")
        self.has_zero_key = bool(has_zero_key)
        self.logits, self.key, self.value = (
            None if x is None else nn.Parameter(x.detach().clone()) for x in (logits, key, value)
        )

    @classmethod
    def logit(cls, num_heads: int, **make: Any) -> AttentionSinks:
        """One learned logit a head, from zero on.

        Args:
            num_heads: Query heads H.
            make: ``device`` and ``dtype``.
        """
        return cls(logits=torch.zeros(check_positive_int("AttentionSinks.logit", "num_heads", num_heads), **make))

    @classmethod
    def zero_key(cls) -> AttentionSinks:
        """A key and a value of zeros: softmax off by one."""
        return cls(has_zero_key=True)

    @classmethod
    def registers(
        cls, num_heads: int, head_dim: int, count: int = 1, *, value_dim: int | None = None, **make: Any
    ) -> AttentionSinks:
        """Learned keys and values, normal with the variance that ``nn.MultiheadAttention`` gives its ``bias_k``.

        Args:
            num_heads: Heads S, a divisor of the query heads: commonly the key heads.
            head_dim: Width D of a key.
            count: Registers N.
            value_dim: Width V of a value, by default D.
            make: ``device`` and ``dtype``.
        """
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "count": count, "value_dim": value_dim}
        for name, size in sizes.items():
            check_positive_int("AttentionSinks.registers", name, size)
        sides = [torch.empty(num_heads, count, width, **make) for width in (head_dim, value_dim)]
        sinks = cls(key=sides[0], value=sides[1])
        sinks.reset_parameters()
        return sinks

    def reset_parameters(self) -> None:
        """Logits of zero; registers normal with variance 1 / (S * width)."""
        with torch.no_grad():
            if self.logits is not None:
                self.logits.zero_()
            for side in (self.key, self.value):
                if side is not None:
                    side.normal_(std=(side.shape[0] * side.shape[2]) ** -0.5)

    def forward(self) -> SinkKeys:
        """What a call needs to know."""
        return SinkKeys(self.logits, self.has_zero_key, self.key, self.value)

    def extra_repr(self) -> str:
        """Which sinks there are."""
        kinds = ["logits"] if self.logits is not None else []
        kinds += ["a zero key"] if self.has_zero_key else []
        kinds += [] if self.key is None else [f"{self.key.shape[1]} registers"]
        return ", ".join(kinds)
