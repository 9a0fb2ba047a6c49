"""Random transport problems of every kind, from a seed."""

import math

import torch

from eotattn.transport import Anderson, Newton, Sinkhorn, TransportProblem

INF = math.inf
SOLVERS = {"anderson": Anderson, "newton": Newton, "sinkhorn": Sinkhorn}
#: (query_penalty, key_penalty); None is a free key marginal.
TWO_SIDED = [(INF, INF)]
UNBALANCED = [(INF, 2.0), (2.0, INF), (1.0, 3.0), (0.0, 1.0)]
FREE = [(INF, None), (0.7, None), (0.0, None)]


def random_problem(
    seed,
    penalties=(INF, None),
    *,
    sizes=(5, 7),
    scale=1.0,
    epsilon=0.5,
    masked=False,
    zeros=False,
    batch=(),
    dtype=torch.float64,
):
    """Draw a feasible problem; a masked balanced one takes its marginals from a coupling that respects the mask."""
    generator = torch.Generator().manual_seed(seed)
    n, m = sizes

    def uniform(*shape):
        return torch.rand(*batch, *shape, generator=generator, dtype=torch.float64)

    score = (2 * uniform(n, m) - 1) * scale
    log_prior = 2 * uniform(n, m) - 1
    query_marginal, key_marginal = uniform(n) + 0.05, uniform(m) + 0.05
    if masked:
        witness = (uniform(n, m) + 0.05) * (uniform(n, m) > 0.5)
        witness[..., 0] += 0.05
        witness[..., 0, :] += 0.05
        log_prior = log_prior.masked_fill(witness == 0, -INF)
        query_marginal, key_marginal = witness.sum(-1), witness.sum(-2)
    if zeros:
        query_marginal[..., 1] = 0
        key_marginal[..., 2] = 0
    query_penalty, key_penalty = penalties
    tensors = {"log_prior": log_prior, "query_marginal": query_marginal / query_marginal.sum(-1, keepdim=True)}
    if key_penalty is not None:
        tensors |= {"key_marginal": key_marginal / key_marginal.sum(-1, keepdim=True)}
    options = {} if key_penalty is None else {"key_penalty": key_penalty}
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    return TransportProblem(score.to(dtype), epsilon=epsilon, query_penalty=query_penalty, **tensors, **options)
