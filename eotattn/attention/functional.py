"""The one functional door: attention with a prior.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width, P lanes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eotattn.attention.attention_sinks import AttentionSinks
from eotattn.attention.backends import BACKENDS, choose
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.call import AttentionCall, autocast_dtype
from eotattn.attention.call_positions import GivenPositions
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.observers import serve
from eotattn.attention.token_bias import check_biases
from eotattn.checks import check_choice, check_floating, fail, require
from eotattn.priors import LogPrior

__all__ = ["prior_attention"]


def prior_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prior: LogPrior | None = None,
    query_positions: GivenPositions = None,
    key_positions: GivenPositions = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    documents: PackedDocuments | None = None,
    cache: KeyValueCache | None = None,
    sinks: AttentionSinks | Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    return_lse: bool = False,
    tolerance: float | None = None,
    backend: str = "auto",
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    query_gains: Tensor | Sequence[Tensor | None] = (),
) -> Tensor | tuple[Tensor, ...]:
    """Compute attention_weights = softmax(scale * <query, key> + log_prior) and apply them to the values.

    This is the solution of the one-sided entropic transport problem with score scale * <query, key>, temperature one
    and the given log-prior. A query without admissible keys gets output, weights and gradients zero. The content is
    not searched for NaN: PyTorch's fused CPU kernel turns a NaN query row into zeros, the reference keeps it.

    In ``torch.distributed.tensor.experimental.context_parallel``, on a GPU, every process passes its own tokens.
    Positions left out are those of its shard (a number is that of the first token of all), ``is_causal`` is the
    engine's own causality, and lanes count positions alike on all processes. Sinks, masks, windows, documents, caches
    and ``return_lse`` are refused there.

    Args:
        query: (B, H, Q, D), floating.
        key: (B, Hk, K, D); Hk divides H (grouped-query attention); kernels get the Hk heads as they are.
        value: (B, Hk, K, V).
        prior: Log-prior with H heads, nats; ``None`` is the uniform prior of plain attention.
        query_positions: (Q,) or (B, Q), tokens: a tensor, a list, a ``range``, or the first of consecutive ones; by
            default 0, 1, 2, ... On grids with a trailing axis. Only the prior and ``is_causal`` read positions.
        key_positions: (K,) or (B, K), likewise.
        attn_mask: Broadcastable to (B, H, Q, K): boolean with true where a query may attend, or floating and added to
            the score (nats); -inf and the lowest number of its dtype hide a key.
        key_padding_mask: (B, K) boolean, true where a key is padding, as in ``nn.MultiheadAttention``.
        is_causal: Keys at later *positions* than the query are inadmissible.
        window: Keys ``window`` or more tokens before the query are inadmissible too, by positions; with ``is_causal``.
            Where positions are ranges or left out, work and memory grow with Q * window.
        documents: Documents packed into the batch, each of which attends to itself alone, at positions from 0 on.
        cache: Earlier keys and values. ``key`` and ``value`` are appended to it, all positions follow from it, and
            ``key_padding_mask`` (B, Q) speaks of the new tokens. For inference: no gradient reaches cached tensors.
        sinks: What queries may attend to instead of keys, out of reach of the prior, masks, positions and caches:
            :class:`AttentionSinks`, or (H,) logits, one a head, nats.
        scale: Factor on the inner products, default 1 / sqrt(D).
        dropout_p: Probability of dropping a weight, in [0, 1).
        return_weights: Also return the weights (backend ``"reference"``).
        return_lse: Also return ln sum_j exp(scale * <query, key_j> + log_prior_j) over admissible keys and sinks,
            differentiable as the output is; :func:`merge` joins calls over disjoint keys by it.
        tolerance: Error that the prior's lanes may add in 16 bits, nats; by default about what content's own rounding
            costs. A smaller one takes more lanes.
        backend: ``"auto"``, ``"sdpa"`` (lanes through stock fused calls), ``"near_far"`` (priors that are a constant,
            or have lanes, far away: near keys by blocks, far keys in stock calls), ``"rebased"`` (lanes through
            log2(Q / 128) stock calls that count from close by: however far biases sum up, only what they span in 128
            tokens rounds), ``"varlen"`` (lanes through the variable-length kernel; GPU, 16 bits), ``"flex"`` (GPU) or
            ``"reference"`` (dense). A backend asked for by name is used or refused, never replaced; ``"auto"`` takes
            the fastest that can serve the call, as measured; :func:`explain` says which, and why.
        key_bias: A log-prior of keys that the tokens decide: (B, H, K), or (B, Hk, K) or (B, 1, K) where heads share
            it and its lanes; nats, finite, any floating dtype, with gradient. Beside a cache (B, ..., Q), of the new
            tokens, with every call or with none. Lanes carry it exactly to the last digit of float32; float64 keeps
            sums over many tokens exact until then. One call adds it to the scores in float32, which errs by up to 6e-8
            of what the bias spans: where that is beyond 1e-5 nats in float32, or beyond ``tolerance``, ``"auto"`` takes
            ``"rebased"`` on a CPU, which sees the numbers at once; elsewhere name it. Hide keys by
            ``key_padding_mask`` instead.
        query_bias: (B, H, Q), nats: a constant of each row. Softmax does not see it; sinks and the log-sum-exp do. Its
            gradient is what rounding leaves of a sum that is zero in exact arithmetic. Where both biases are of the
            same numbers, as the running sums -c and c of log forgetting gates, the gradient of these numbers is a
            difference of both, in which that cancels: long sums of it stay right in 16 bits.
        query_gains: (B, H, Q), dimensionless: the factor by which a query sees the prior, which needs bilinear terms;
            or one, or ``None``, for each of ``prior.terms()``.

    Returns:
        (B, H, Q, V) in the dtype of ``query``, under autocast in autocast's. In a tuple behind it: with
        ``return_weights`` the weights (B, H, Q, K), rows sum to one less what sinks take; with ``return_lse`` the
        log-sum-exp (B, H, Q), nats, float64 for float64 and float32 otherwise, -inf at queries without admissible keys.

    Raises:
        ValueError: For shapes, devices, positions or values that do not fit.
        TypeError: For dtypes that do not fit.
        NotImplementedError: If the named backend cannot serve the call; names both backend and prior.

    Source:
        Litman and Guo 2026 (arXiv 2601.15380), proposition 3.1; Litman 2025 (arXiv 2508.08369).

    Example:
        >>> import torch
        >>> from eotattn.priors import RecencyPrior
        >>> query = key = value = torch.ones(1, 2, 5, 8)
        >>> prior_attention(query, key, value, prior=RecencyPrior(2), is_causal=True).shape
        torch.Size([1, 2, 5, 8])
    """
    if backend != "auto":
        check_choice("prior_attention", "backend", backend, ("auto", *BACKENDS))
    new = (key, value, key_padding_mask, key_bias)
    if cache is not None:
        _check_left_to_cache(query, key, cache, query_positions, key_positions, documents)
        check_biases("prior_attention", query, key, key_bias, query_bias, cache.scale if scale is None else scale)
        view = cache.after(*new)
        key, value, query_positions, key_positions, key_padding_mask, key_bias = view
    call = AttentionCall.from_arguments(
        query,
        key,
        value,
        prior=prior,
        query_positions=query_positions,
        key_positions=key_positions,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal and (cache is None or query.shape[2] > 1 or window is not None),  # one query sees all
        window=window,
        documents=documents,
        scale=scale,
        dropout_p=dropout_p,
        return_weights=return_weights,
        return_lse=return_lse,
        sinks=sinks,
        tolerance=tolerance,
        cache=cache,
        key_bias=key_bias,
        query_bias=query_bias,
        query_gains=query_gains,
    )
    served_by = choose(call) if backend == "auto" else BACKENDS[backend]
    if backend != "auto" and (reason := served_by.refusal(call)):
        raise NotImplementedError(
            f"prior_attention: backend {backend!r} cannot serve this call with {call.prior_name}: {reason}."
        )
    if cache is not None:  # after all checks passed: a call that fails leaves the cache as it was
        cache.fill(view.query_positions, *new)
        if not cache.shows(call.key, call.value):
            call = call.with_content(cache.keys, cache.values)
    device = call.query.device
    if autocast_dtype(device) is None:
        output, weights, lse = serve(call, served_by)
    else:  # lanes keep the dtype they have
        with torch.autocast(device.type, enabled=False):
            output, weights, lse = serve(call, served_by)
    if not (return_weights or return_lse):
        return output
    more = tuple(one for one, asked in ((weights, return_weights), (lse, return_lse)) if asked and one is not None)
    return (output, *more)


def _check_left_to_cache(
    query: Tensor,
    key: Tensor,
    cache: KeyValueCache,
    query_positions: GivenPositions,
    key_positions: GivenPositions,
    documents: PackedDocuments | None,
) -> None:
    owner = "prior_attention"
    remedy = "Make one with PriorAttention.make_cache"
    require(isinstance(cache, KeyValueCache), owner, "cache", "be a KeyValueCache", cache, remedy, error=TypeError)
    for name, side in (("query", query), ("key", key)):
        check_floating(owner, name, side)
        require(side.dim() == 4, owner, name, "have shape (B, heads, length, width)", side, "Split the heads first")
    if key.shape[2] != query.shape[2]:
        fail(owner, "key", f"have {query.shape[2]} tokens, as the query has", key, "Pass new tokens alone")
    others = (("query_positions", query_positions), ("key_positions", key_positions), ("documents", documents))
    for name, given in others:
        if given is not None:
            fail(owner, name, "be left to the cache", given, "Drop it")
