"""ForgettingPrior: gates that the tokens decide, by which a query forgets what lies before them.

Legend: B batch, H heads, G gates a token, L tokens, E width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eotattn.checks import check_floating, check_no_nan, check_positive_int, check_shape, require
from eotattn.priors.base import LogPrior
from eotattn.priors.cumulative import cumulative_sums
from eotattn.priors.memory import is_plain
from eotattn.priors.reading import Reading, Tokens, expand_heads
from eotattn.priors.terms import KeyTerm, Term

__all__ = ["ForgettingPrior", "running_sums"]


class ForgettingPrior(LogPrior):
    """Forgetting gates: log_prior = sum of log f over the tokens after the key, up to and with the query.

    Every token has gates f in (0, 1), f = sigmoid(weight . token + bias), one a head: what a token's gate lets through
    is all that later queries see of what lies before it. The sum is a difference of running sums, c_i - c_j: its key
    half rides in one lane (in 16 bits three), its query half is a constant of the row. Use it under a causal mask, in
    self-attention; it adds to any prior on a sequence. The gates start at ``half_lives``, the same for every token.

    It reads the tokens: :class:`~eotattn.attention.PriorAttention` calls :meth:`read_tokens` with its input, and a
    cache keeps the running sums. The forms of positions alone (``dense``, ``lanes``) are without it.

    Args:
        embed_dim: Width E of the tokens.
        num_heads: Number of query heads H.
        num_kv_heads: Gates a token G, a divisor of H: consecutive heads share one, and its lanes; by default H.
        half_lives: The shortest and the longest time in which the gates halve what they let through, tokens; the heads'
            lie between them, geometrically. Or G of them.

    Attributes:
        weight: (G, E), zero at the start.
        bias: (G,), logits.

    Source:
        Lin et al. 2025 (arXiv 2503.02130), section 3.

    Example:
        >>> from eotattn import PriorAttention
        >>> from eotattn.priors import Tokens
        >>> prior = ForgettingPrior(8, 2, half_lives=(1.0, 4.0))
        >>> PriorAttention(8, 2, prior=prior)(torch.ones(1, 3, 8), is_causal=True)[0].shape
        torch.Size([1, 3, 8])
        >>> tokens = torch.ones(1, 3, 8)  # (B, L, E)
        >>> prior.read_tokens(Tokens(tokens, tokens)).query_bias[0].exp()
        tensor([[0.5000, 0.2500, 0.1250],
                [0.8409, 0.7071, 0.5946]], dtype=torch.float64, grad_fn=<ExpBackward0>)
    """

    biases_keys = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        half_lives: Sequence[float] = (2.0, 65536.0),
    ) -> None:
        super().__init__(num_heads)
        owner = "ForgettingPrior"
        self.embed_dim = check_positive_int(owner, "embed_dim", embed_dim)
        count = num_heads if num_kv_heads is None else check_positive_int(owner, "num_kv_heads", num_kv_heads)
        require(num_heads % count == 0, owner, "num_kv_heads", f"divide {num_heads}", num_kv_heads, "Choose a divisor")
        listed = isinstance(half_lives, Sequence) and all(isinstance(time, (int, float)) for time in half_lives)
        remedy = "Pass the shortest and the longest"
        require(listed, owner, "half_lives", "be a list of numbers, tokens", half_lives, remedy, error=TypeError)
        good = len(half_lives) in (2, count) and all(0 < time < math.inf for time in half_lives)
        rule = f"be two positive numbers, or {count} of them"
        require(good, owner, "half_lives", rule, tuple(half_lives), remedy)
        self.half_lives = _spread(half_lives, count)
        self.num_kept = count
        self.weight = nn.Parameter(torch.empty(count, embed_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(count, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates at their half-lives, whatever the token."""
        nn.init.zeros_(self.weight)
        kept = [2.0 ** (-1 / time) for time in self.half_lives]
        logits = [math.log(gate) - math.log(-math.expm1(math.log(gate))) for gate in kept]
        with torch.no_grad():
            self.bias.copy_(torch.tensor(logits, dtype=torch.float64))

    def log_gates(self, tokens: Tensor) -> Tensor:
        """(B, G, L) log f of tokens (B, L, E), nats, at most zero, in float32 or finer."""
        check_shape("ForgettingPrior", "tokens", tokens, (None, None, self.embed_dim), "Build it for this width")
        logits = functional.linear(tokens, self.weight.to(tokens.dtype))  # as content is projected
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.logsigmoid(logits.to(wide) + self.bias).transpose(1, 2)

    def read_tokens(self, tokens: Tokens) -> Reading:
        """The running sums of log gates, as a bias of keys and of queries."""
        log_gates = self.log_gates(tokens.key)
        sums = running_sums(
            log_gates, padding=tokens.padding, document_positions=tokens.document_positions, before=tokens.before
        )
        of_queries = None
        if tokens.query is tokens.key:
            of_queries = expand_heads(sums, self.num_heads)
        return Reading(key_bias=-sums, query_bias=of_queries, kept=sums)

    def log_prior(self, head: Tensor, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Zero: positions alone decide nothing."""
        return 0.0 * (head + query_position + key_position)

    def terms(self) -> tuple[Term | KeyTerm, ...]:
        """None: positions alone decide nothing."""
        return ()


def running_sums(
    log_gates: Tensor,
    *,
    padding: Tensor | None = None,
    document_positions: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Sums c of log gates up to and with every token: ``key_bias=-c, query_bias=c`` is forgetting.

    Args:
        log_gates: (B, G, L) nats, at most zero.
        padding: (B, L) boolean, true where a token is padding: its gate lets everything through.
        document_positions: (1 or B, L) position of each token in its document; every document starts its own sum.
        before: (B, G) float64, the sums at the last token of an earlier chunk, which these go on from.

    Returns:
        (B, G, L) nats, float64.

    Raises:
        ValueError: If gates are above one or no numbers; on a GPU, where looking would wait for it, nothing is.

    Example:
        >>> running_sums(torch.tensor([[[-1.0, -2.0, -4.0]]]), document_positions=torch.tensor([[0, 1, 0]])).tolist()
        [[[-1.0, -3.0, -4.0]]]
    """
    _check_log_gates(log_gates)
    wide = log_gates.double()
    if padding is not None:
        wide = wide.masked_fill(padding.unsqueeze(1), 0.0)
    sums = cumulative_sums(wide)
    if before is not None:
        return sums + before.unsqueeze(-1)
    if document_positions is None:
        return sums
    starts = torch.arange(sums.shape[-1], device=sums.device) - document_positions
    return sums - (sums - wide).gather(-1, starts.unsqueeze(1).expand_as(sums))


def _check_log_gates(log_gates: Tensor) -> None:
    owner, remedy = "running_sums", "Pass the logarithm of a sigmoid"
    check_floating(owner, "log_gates", log_gates)
    check_shape(owner, "log_gates", log_gates, (None, None, None), "Put the gates before the tokens")
    if log_gates.device.type == "cpu" and is_plain() and log_gates.numel() > 0:
        check_no_nan(owner, "log_gates", log_gates.detach())
        largest = float(log_gates.detach().max())
        require(largest <= 0, owner, "log_gates", "be at most zero, since gates are at most one", largest, remedy)


def _spread(half_lives: Sequence[float], count: int) -> tuple[float, ...]:
    """One half-life a gate: those given, or a geometric sequence from the first to the last of two."""
    if len(half_lives) == count:
        return tuple(float(time) for time in half_lives)
    first, last = half_lives
    return tuple(first * (last / first) ** (n / max(1, count - 1)) for n in range(count))
