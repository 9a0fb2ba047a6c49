"""What one attention call did, by row, by key and by lag, without its weights.

Legend: B batch, H query heads, Q queries, K keys, V value width, N chosen keys.

With logits z_ij = s_ij + K_ij (content and prior, nats) and weights p_ij = exp(z_ij - lse_i). An explicit sink is one
further outcome of every row, with logit b and no value: lse_i includes it, and so does the entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["AttentionStatistics"]


@dataclass(frozen=True, eq=False)
class AttentionStatistics:
    """What one attention call did, without its weights. Rows without admissible keys hold zeros (lse: -inf).

    Attributes:
        log_sum_exp: (B, H, Q) nats.
        key_log_sum_exp: (B, H, Q) the same over the keys alone, nats; less than it by what an explicit sink adds.
        entropy: (B, H, Q) -sum p ln p, nats, in [0, ln(num_keys)] (one outcome more with an explicit sink).
        participation: (B, H, Q) sum of squared weights, in [1 / num_keys, 1]; its inverse counts keys.
        num_keys: (B, H, Q) admissible keys.
        score_min: (B, H, Q) smallest admissible content score, nats.
        score_max: (B, H, Q) largest admissible content score, nats; the difference is omega.
        expected_score: (B, H, Q) sum_j p_ij s_ij, nats.
        prior_log_sum_exp: (B, H, Q) ln sum_j exp(K_ij) over admissible keys, nats; ln(num_keys) without prior.
        key_mass: (B, H, Q, N) weight on the chosen keys.
        explicit_sink_mass: (B, H, Q) weight on the explicit sink; zero without one.
        margin: (B, H, Q) z_ij* - max_{k != j*} z_ik of the first chosen key j*, nats; NaN without competitor.
        content_margin: (B, H, Q) the content part of that difference, nats.
        prior_margin: (B, H, Q) its prior part, nats.
        column_mass: (B, H, K) sum of weights over the queries that count, keys in order of the sequence.
        column_count: (B, H, K) queries that count and admit the key.
        lag_mass: (B, H, Q + K - 1) sum of weights of the queries that count, by lag.
        first_lag: Lag of the first entry of ``lag_mass``: query position - key position, tokens.
        counted: (B, Q) queries that count: not padding.
        backend: What computed it, ``"kernel"`` or ``"blocks"``.
        output: (B, H, Q, V) attention output, or ``None`` where no value was given.
    """

    log_sum_exp: Tensor
    key_log_sum_exp: Tensor
    entropy: Tensor
    participation: Tensor
    num_keys: Tensor
    score_min: Tensor
    score_max: Tensor
    expected_score: Tensor
    prior_log_sum_exp: Tensor
    key_mass: Tensor
    explicit_sink_mass: Tensor
    margin: Tensor
    content_margin: Tensor
    prior_margin: Tensor
    column_mass: Tensor
    column_count: Tensor
    lag_mass: Tensor
    first_lag: int
    counted: Tensor
    backend: str
    output: Tensor | None = None

    @property
    def score_range(self) -> Tensor:
        """(B, H, Q) omega_i = max_j s_ij - min_j s_ij, nats."""
        return self.score_max - self.score_min

    @property
    def num_outcomes(self) -> Tensor:
        """(B, H, Q) what the weights are shared among: admissible keys, and an explicit sink where there is one."""
        return self.num_keys + (self.explicit_sink_mass > 0)

    @property
    def context_sensitivity(self) -> Tensor:
        """(B, H, Q) Psi_i = sum_{k != j*} p_ik: the weight on other keys than the first chosen one."""
        held = (self.num_keys > 0).to(self.entropy.dtype)
        return (held - self.key_mass[..., 0] - self.explicit_sink_mass).clamp(min=0)

    @property
    def context_sensitivity_bound(self) -> Tensor:
        """(B, H, Q) (n - 1) / (exp(margin) + n - 1), at least Psi, over n admissible keys; one without a margin."""
        others = (self.num_keys - 1).clamp(min=0)
        bound = torch.sigmoid(others.log() - self.margin)
        return torch.where(self.margin.isnan(), 1.0, bound)

    def counted_from(self, starts: Tensor, key_start: int) -> AttentionStatistics:
        """Columns counted from the start of each sequence; what precedes it is dropped, zeros follow at the end.

        Args:
            starts: (B,) position of the first token of each sequence.
            key_start: Position of the first column so far.
        """
        width = self.column_mass.shape[-1]
        index = torch.arange(width + key_start, device=starts.device) + starts[:, None] - key_start
        inside = ((index >= 0) & (index < width))[:, None, :]
        at = index.clamp(0, width - 1)[:, None, :].expand(-1, self.column_mass.shape[1], -1)
        mass, count = (x.gather(-1, at) * inside for x in (self.column_mass, self.column_count))
        return replace(self, column_mass=mass, column_count=count)
