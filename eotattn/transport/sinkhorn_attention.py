"""SinkhornAttention: projections around a transport problem with two sides, called like ``PriorAttention``.

It stands in this room because its core is a solver: semi-relaxed attention is the special case that needs none.
"""

# Legend: B batch, E model width, H heads, n queries, m keys, d head width.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eotattn.checks import check_floating, check_positive, check_positive_int, check_shape, fail, require
from eotattn.priors import LogPrior
from eotattn.transport.problems import TransportProblem
from eotattn.transport.problems.affinity import Number
from eotattn.transport.solution import TransportSolution
from eotattn.transport.solvers.anderson import Anderson
from eotattn.transport.solving import solve

__all__ = ["SinkhornAttention"]

_OWNER = "SinkhornAttention"


class SinkhornAttention(nn.Module):
    r"""Multi-head attention whose keys have a marginal too: from softmax to doubly stochastic.

    Every head solves ``min <P, -score> + KL(P || R) + key_penalty KL(P^T 1 || uniform)`` in units of the scaled score,
    with rows of mass 1 / n; the output is n P applied to the values, so rows of weights sum to one. A key penalty of
    zero is softmax attention, an infinite one makes every key receive the same attention (Sinkformers). The solver
    makes fused calls in O(n + m) memory, and gradients follow implicit differentiation, not the iterations.

    Args:
        embed_dim: Model width E, a multiple of ``num_heads``.
        num_heads: Heads H.
        key_penalty: Nats, in [0, inf]; fixed, unless ``train_key_penalty`` is called.
        prior: Log-prior with lanes and H heads; ``None`` for none.
        tolerance: Bound for the marginal error, relative to the mass.
        max_iterations: Steps of the solver; what is reached then is used, and ``transport`` tells what that is.
        bias: Whether the projections have biases.
        batch_first: Whether inputs are (B, length, E) rather than (length, B, E).

    Example:
        >>> layer = SinkhornAttention(8, num_heads=2, key_penalty=float("inf"))
        >>> output, weights = layer(torch.randn(1, 5, 8), need_weights=True)
        >>> weights.sum(-2).sub(1).abs().max() < 1e-3
        tensor(True)

    Source: two-sided, Sander et al. 2022; penalties, Chizat et al. 2018.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        key_penalty: float,
        prior: LogPrior | None = None,
        tolerance: float = 1e-4,
        max_iterations: int = 200,
        bias: bool = True,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim = check_positive_int(_OWNER, "embed_dim", embed_dim)
        self.num_heads = check_positive_int(_OWNER, "num_heads", num_heads)
        divides = embed_dim % num_heads == 0
        require(divides, _OWNER, "embed_dim", f"be a multiple of num_heads ({num_heads})", embed_dim, "Change one")
        self._key_penalty = check_positive(_OWNER, "key_penalty", key_penalty, allow_zero=True, allow_inf=True)
        self.log_key_penalty: nn.Parameter | None = None
        self.tolerance = check_positive(_OWNER, "tolerance", tolerance)
        self.max_iterations = check_positive_int(_OWNER, "max_iterations", max_iterations)
        if prior is not None:
            is_prior = isinstance(prior, LogPrior)
            require(is_prior, _OWNER, "prior", "be a LogPrior", type(prior), "Pass a prior", error=TypeError)
            fits = prior.num_heads == num_heads and prior.has_lanes
            rule, remedy = f"have lanes and {num_heads} heads", "Build it for these heads"
            require(fits, _OWNER, "prior", rule, type(prior).__name__, remedy)
        self.prior, self.batch_first = prior, batch_first
        self.query_proj, self.key_proj, self.value_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(4)
        )

    @property
    def key_penalty(self) -> float:
        """Nats, in [0, inf]; where it is trained, what it is by now."""
        return self._key_penalty if self.log_key_penalty is None else float(self.log_key_penalty.detach().exp())

    def train_key_penalty(self) -> SinkhornAttention:
        """Make the penalty a parameter, kept positive by its logarithm ``log_key_penalty``.

        Returns:
            This layer, so that calls chain.

        Raises:
            ValueError: If the penalty is zero or infinite, where training could not move it.

        Example:
            >>> layer = SinkhornAttention(8, num_heads=2, key_penalty=1.0).train_key_penalty()
            >>> layer.log_key_penalty.requires_grad
            True
        """
        start = check_positive(_OWNER, "key_penalty", self.key_penalty)
        like = self.out_proj.weight
        self.log_key_penalty = nn.Parameter(like.new_tensor(math.log(start)))
        return self

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (B, n, E), or (n, B, E) without ``batch_first``.
            key: (B, m, E); the query by default.
            value: (B, m, E); the key by default.
            key_padding_mask: (B, m) boolean, true where a key is padding; in self-attention such queries then carry
                no mass either.
            need_weights: Whether to return the weights, n x m numbers a head.
            is_causal: Query i sees keys 0 to i; with a key penalty of zero only.
            query_positions: (n,) or (B, n), tokens; with a prior only.
            key_positions: (m,) or (B, m).

        Returns:
            ``(output, weights)``: like the query, and (B, H, n, m) with rows that sum to one, or ``None``.

        Raises:
            TypeError: If a tensor has the wrong dtype.
            ValueError: If a shape is wrong, or ``is_causal`` meets a key penalty.
        """
        source = (query if key is None else key) if value is None else value
        solution = self.transport(
            query,
            key,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            query_positions=query_positions,
            key_positions=key_positions,
        )
        self._check_input("value", source)
        values = self._heads(self.value_proj, source)
        mixed = solution.attend(values.to(solution.problem.affinity.dtype)).to(values.dtype)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        return output, solution.attention_weights if need_weights else None

    def transport(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> TransportSolution:
        """Solve the transport problem of every head; the arguments are those of ``forward``.

        Returns:
            The solution, of batch (B, H): its ``certificate`` tells what the layer's attention is worth.

        Raises:
            TypeError: As ``forward``.
            ValueError: As ``forward``.
        """
        is_self = key is None or key is query
        key = query if key is None else key
        self._check_input("query", query)
        self._check_input("key", key)
        key_penalty = self.key_penalty
        if is_causal and key_penalty > 0:
            got = f"a key_penalty of {key_penalty:g}"
            rule = "be left out under a key penalty, by which earlier queries would see later ones"
            fail(_OWNER, "is_causal", rule, got, "Build the layer with key_penalty=0")
        left, right = self._heads(self.query_proj, query), self._heads(self.key_proj, key)
        padding = self._padding(key_padding_mask, right)
        epsilon = math.sqrt(left.shape[-1])
        dtype = torch.promote_types(left.dtype, torch.float32)
        key_marginal = None
        if key_penalty > 0:
            key_marginal = _uniform(right.shape[-2], padding, dtype, right.device)
        problem = TransportProblem.from_factors(
            left,
            right,
            epsilon=epsilon,
            prior=self.prior,
            query_positions=query_positions,
            key_positions=key_positions,
            key_padding=None if padding is None else padding[:, None],
            is_causal=is_causal,
            query_marginal=_uniform(left.shape[-2], padding if is_self else None, dtype, left.device),
            key_marginal=key_marginal,
            key_penalty=self._penalty(epsilon, dtype) if key_marginal is not None else None,
        )
        if key_marginal is None:
            return solve(problem)
        return solve(problem, Anderson(tolerance=self.tolerance, max_iterations=self.max_iterations))

    def _penalty(self, epsilon: float, dtype: torch.dtype) -> Number:
        """The key penalty, cost units; where it is trained, with its gradient."""
        if self.log_key_penalty is None:
            return self._key_penalty * epsilon
        return (epsilon * self.log_key_penalty.to(dtype).exp())[None]

    def _heads(self, projection: nn.Module, tensor: Tensor) -> Tensor:
        """Project and split: (B, H, length, d)."""
        tensor = tensor if self.batch_first else tensor.transpose(0, 1)
        projected: Tensor = projection(tensor)
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _check_input(self, name: str, tensor: Tensor) -> None:
        check_floating(_OWNER, name, tensor)
        check_shape(_OWNER, name, tensor, (None, None, self.embed_dim), "Pass batch, length and model width")

    def _padding(self, mask: Tensor | None, key: Tensor) -> Tensor | None:
        if mask is None:
            return None
        is_boolean = isinstance(mask, Tensor) and mask.dtype == torch.bool
        remedy = "Pass True where a key is padding"
        require(is_boolean, _OWNER, "key_padding_mask", "be a boolean tensor", mask, remedy, error=TypeError)
        check_shape(_OWNER, "key_padding_mask", mask, (key.shape[0], key.shape[-2]), remedy)
        empty = int(mask.all(-1).sum())
        rule = "leave every sample a key"
        require(empty == 0, _OWNER, "key_padding_mask", rule, f"{empty} samples without one", "Drop these samples")
        return mask

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, key_penalty={self.key_penalty:g}"


def _uniform(length: int, padding: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Equal masses on what is not padding, shape (length,) or (B, 1, length)."""
    if padding is None:
        return torch.full((length,), 1.0 / length, dtype=dtype, device=device)
    alive = (~padding).to(dtype)[:, None]
    return alive / alive.sum(-1, keepdim=True)
