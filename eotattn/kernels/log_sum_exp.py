"""One fused attention call that also returns the log-sum-exp of its rows, differentiable in both.

Legend: B batch, H query heads, G query heads a key head, Q queries, K keys, D score width, V value width.

The row log-sum-exp is what transport needs of attention: it is a half-step of Sinkhorn's algorithm, and the call with
queries and keys exchanged is the other half. It also joins calls over disjoint keys, and sinks to them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.compat import (
    cpu_flash_attention,
    cpu_flash_attention_backward,
    cudnn_attention,
    efficient_attention,
    efficient_attention_backward,
)
from eotattn.kernels.sdpa import WIDE_STEP, WIDTH_STEP

__all__ = ["attend", "biased_log_sum_exp", "route"]

#: Elements of one block of logits where no fused operator serves.
_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}
#: The widest score that cuDNN's attention, and the kernel made for the log-sum-exp alone, take.
_WIDEST = 128


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute ``softmax(scale <query, key>) value`` and ``log sum_k exp(scale <query, key_k>)``.

    One fused operator: the CPU's flash attention; on CUDA cuDNN's in 16 bits and the memory-efficient one in float32
    and wherever gradients are followed; blocks of rows elsewhere (float64 on CUDA). Never Q x K numbers. Gradients
    are those of both outputs, once.

    Args:
        query: (B, H, Q, D), finite.
        key: (B, H / G, K, D), finite.
        value: (B, H / G, K, V) in the dtype of ``query``; ``None`` where only the log-sum-exp is wanted.
        scale: Factor on the inner products, positive.
        mask: Boolean (true may attend) or additive, nats, broadcastable to (B, H, Q, K), without gradient. A query
            that it leaves no key has output zero and log-sum-exp -inf.
        is_causal: Query i sees keys 0 to i.

    Returns:
        ``(output, log_sum_exp)``: (B, H, Q, V) in the dtype of ``query`` (V = 0 without a value), and (B, H, Q) in
        nats, float64 for float64 and float32 otherwise.

    Example:
        >>> attend(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4), scale=1.0)[1]
        tensor([[[0.6931]]])

    Source: the operators of PyTorch's ``scaled_dot_product_attention``.
    """
    width = 0 if value is None else value.shape[-1]
    value = key.new_zeros((*key.shape[:-1], WIDTH_STEP)) if value is None else value
    if query.shape[1] != key.shape[1]:
        return _grouped(query, key, value, width, scale, mask, is_causal)
    has_keys = None
    if mask is not None:
        mask, has_keys = _finite_rows(mask)
    operands = (query, key, value)
    with _without_autocast(query.device):  # the dtype is the caller's choice
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            output, log_sum_exp = _Differentiable.apply(*operands, mask, scale, is_causal)
        else:
            output, log_sum_exp = _forward(*operands, mask, scale, is_causal, route(query, value, mask))
    output = output[..., :width]
    if has_keys is None:
        return output, log_sum_exp
    return output.masked_fill(~has_keys, 0.0), log_sum_exp.masked_fill(~has_keys.squeeze(-1), float("-inf"))


def route(query: Tensor, value: Tensor, mask: Tensor | None = None, *, with_gradient: bool = False) -> str:
    """Name the operator that serves a call: ``"cpu"``, ``"cudnn"``, ``"efficient"`` or ``"blocks"``.

    Args:
        query: (B, H, Q, D).
        value: (B, H, K, V).
        mask: Broadcastable to (B, H, Q, K), if there is one.
        with_gradient: Whether gradients will be followed.

    Example:
        >>> route(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
        'cpu'
    """
    if query.device.type == "cpu":
        return "cpu" if query.dtype in (torch.float64, torch.float32, torch.bfloat16) else "blocks"
    if query.device.type != "cuda" or query.dtype == torch.float64:
        return "blocks"
    narrow = max(_padded(query.shape[-1]), _padded(value.shape[-1])) <= _WIDEST
    plain = mask is None and not with_gradient and query.dtype != torch.float32
    if not plain or not narrow or not torch.backends.cuda.cudnn_sdp_enabled():
        return "efficient"
    return "cudnn"


def biased_log_sum_exp(query: Tensor, key: Tensor, bias: Tensor, *, scale: float) -> Tensor | None:
    """Compute ``log sum_m exp(scale <query_n, key_m> + bias_m)`` by the kernel made for it, where there is one.

    It reads nothing but its arguments and multiplies no values, so it costs about half of an attention call; the bias
    stays in float32 instead of travelling in lanes. It has no gradient.

    Args:
        query: (B, N, D).
        key: (B, M, D).
        bias: (B, M), nats, float32; -inf removes a key.
        scale: Factor on the inner products.

    Returns:
        (B, N), nats, float32, -inf where no key is left; ``None`` where the kernel does not serve: off CUDA, without
        Triton, in float64, wider than 128, or where gradients are followed.

    Example:
        >>> biased_log_sum_exp(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3), scale=1.0) is None
        True

    Source: original; online softmax, Milakov and Gimelshein 2018.
    """
    follows = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, bias))
    served = (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float32)
        and 0 < query.shape[-1] <= _WIDEST
    )
    kernel = _triton() if served and not follows else None
    if kernel is None:
        return None
    query, key = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key))
    with torch.cuda.device(query.device):  # Triton launches on the current one
        found: Tensor = kernel.launch(query, key, bias.contiguous(), scale)
    return found


@cache
def _triton() -> Any:
    """The file with the kernel, or ``None`` without Triton."""
    try:
        from eotattn.kernels import log_sum_exp_triton
    except ImportError:
        return None
    return log_sum_exp_triton


def _padded(width: int) -> int:
    return -(-width // WIDTH_STEP) * WIDTH_STEP


def _widened(tensor: Tensor, width: int) -> Tensor:
    """The tensor with zeros behind its last axis up to ``width``; rows of numbers side by side."""
    spare = width - tensor.shape[-1]
    if spare:
        return functional.pad(tensor, (0, spare))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, width: int, scale: float, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Query heads that share a key head: as further queries of it where all queries see alike, else keys repeat."""
    group = query.shape[1] // key.shape[1]
    alike = mask is None or mask.dim() < 2 or (mask.shape[-2] == 1 and (mask.dim() < 3 or mask.shape[-3] == 1))
    if alike and not is_causal:
        folded = query.unflatten(1, (-1, group)).flatten(2, 3)
        output, log_sum_exp = attend(folded, key, value, scale=scale, mask=mask)
        output, log_sum_exp = (one.unflatten(2, (group, -1)).flatten(1, 2) for one in (output, log_sum_exp))
    else:
        key, value = (side.repeat_interleave(group, dim=1) for side in (key, value))
        output, log_sum_exp = attend(query, key, value, scale=scale, mask=mask, is_causal=is_causal)
    return output[..., :width], log_sum_exp


def _finite_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with all keys in rows that have none, and which rows have some, (..., 1)."""
    mask = mask.detach()
    seen = mask if mask.dtype == torch.bool else mask > float("-inf")
    has_keys = seen.any(-1, keepdim=True)
    return (mask | ~has_keys if mask.dtype == torch.bool else torch.where(has_keys, mask, 0.0)), has_keys


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool, name: str
) -> tuple[Tensor, Tensor]:
    if name == "blocks":
        return _blocks_forward(query, key, value, mask, scale, is_causal)
    width = value.shape[-1]
    operands = _fused_operands(query, key, value, name)
    output, log_sum_exp, _ = _fused_forward(*operands, _fused_mask(mask, *operands[:2]), scale, is_causal, name)
    return output[..., :width], log_sum_exp


def _fused_operands(query: Tensor, key: Tensor, value: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The operands at widths that the operator takes: one width on the CPU, multiples of eight on a GPU."""
    score_width, value_width = query.shape[-1], value.shape[-1]
    if name == "cpu":
        score_width = value_width = max(score_width, value_width)
    else:
        score_width, value_width = _padded(score_width), _padded(value_width)
    return _widened(query, score_width), _widened(key, score_width), _widened(value, value_width)


def _fused_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What fused operators add to the logits, (B, H, Q, K), its rows aligned as they want them."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, float("-inf"))
    keys = key.shape[-2]
    if query.device.type == "cuda":
        mask = mask.expand(*mask.shape[:-1], keys).to(query.dtype)
        mask = functional.pad(mask, (0, -keys % WIDE_STEP))[..., :keys]
    elif query.dtype == torch.float64 or mask.dtype == torch.float64:
        mask = mask.to(query.dtype)
    return mask.expand(*query.shape[:-1], keys)


def _fused_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool, name: str
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The output, the log-sum-exp, and what the backward operator wants besides."""
    if name == "cpu":
        operands = (query, key, value, 0.0, is_causal)
        output, log_sum_exp = cpu_flash_attention(*operands, scale=scale, attn_mask=mask)
        return output, log_sum_exp, (log_sum_exp,)
    if name == "cudnn":
        output, log_sum_exp, *_ = cudnn_attention(query, key, value, None, True, 0.0, is_causal, False, scale=scale)
        return output, log_sum_exp.reshape(query.shape[:-1]), ()
    output, padded, seed, offset = efficient_attention(query, key, value, mask, True, 0.0, is_causal, scale=scale)
    return output, padded[..., : query.shape[-2]], (padded, seed, offset)


class _Differentiable(torch.autograd.Function):
    """The call with the gradients of both outputs.

    With P the softmax the gradient of a logit is ``P_ij (<dO_i, v_j> - <dO_i, O_i> + dL_i)``. Operators compute the
    first two terms; the third is theirs too if one more column holds 0 in v, dL_i in dO and -1 in O.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor]:
        name = route(query, value, mask, with_gradient=True)
        ctx.options = (scale, is_causal, name, query.shape[-1], value.shape[-1])
        if name == "blocks":
            output, log_sum_exp = _blocks_forward(query, key, value, mask, scale, is_causal)
            ctx.save_for_backward(query, key, value, mask, output, log_sum_exp)
            return output, log_sum_exp
        width = value.shape[-1]
        operands = _fused_operands(query, key, _widened(value, width + 1), name)
        mask = _fused_mask(mask, *operands[:2])
        output, log_sum_exp, rest = _fused_forward(*operands, mask, scale, is_causal, name)
        ctx.save_for_backward(*operands, mask, output, *rest)
        return output[..., :width], log_sum_exp.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_log_sum_exp: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fused attention with its log-sum-exp has first derivatives only; got create_graph=True. "
                "Use backend='reference', or a dense transport problem."
            )
        scale, is_causal, name, score_width, width = ctx.options
        query, key, value, mask, output, *rest = ctx.saved_tensors
        grads: tuple[Tensor, ...]
        if name == "blocks":
            with _without_autocast(query.device):
                given = (query, key, value, mask, output, rest[0], grad_output, grad_log_sum_exp)
                return (*_blocks_backward(*given, scale, is_causal), None, None, None)
        grad = grad_output.new_zeros(output.shape)
        grad[..., :width] = grad_output
        grad[..., width] = grad_log_sum_exp
        # The operators read strides from the output, so the copy keeps its layout.
        output = output.clone()
        output[..., width] = -1.0
        if name == "cpu":
            operands = (grad, query, key, value, output, *rest, 0.0, is_causal)
            grads = cpu_flash_attention_backward(*operands, scale=scale, attn_mask=mask)
        else:
            operands = (grad, query, key, value, mask, output, *rest, 0.0, [True, True, True, False], is_causal)
            grads = efficient_attention_backward(*operands, scale=scale)
        return grads[0][..., :score_width], grads[1][..., :score_width], grads[2][..., :width], None, None, None


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _computing(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _spans(query: Tensor, key: Tensor) -> list[slice]:
    """Blocks of rows whose logits fit the memory set aside."""
    each = query.shape[0] * query.shape[1] * key.shape[-2]
    rows = max(1, _BLOCK_ELEMENTS.get(query.device.type, _BLOCK_ELEMENTS["cpu"]) // each)
    return [slice(start, min(start + rows, query.shape[-2])) for start in range(0, query.shape[-2], rows)]


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, rows: slice, scale: float, is_causal: bool) -> Tensor:
    logits = scale * (query[..., rows, :].to(key.dtype) @ key.mT)
    if mask is not None:
        own = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
        logits = logits.masked_fill(~own, float("-inf")) if mask.dtype == torch.bool else logits + own
    if is_causal:
        position = torch.arange(rows.start, rows.stop, device=key.device)[:, None]
        logits = logits.masked_fill(torch.arange(key.shape[-2], device=key.device) > position, float("-inf"))
    return logits


def _blocks_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    dtype = _computing(query.dtype)
    wide_key, wide_value = key.to(dtype), value.to(dtype)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    log_sum_exp = query.new_empty(query.shape[:-1], dtype=dtype)
    for rows in _spans(query, key):
        logits = _logits(query, wide_key, mask, rows, scale, is_causal)
        log_sum_exp[..., rows] = logits.logsumexp(-1)
        output[..., rows, :] = (logits.softmax(-1) @ wide_value).to(query.dtype)
    return output, log_sum_exp


def _blocks_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_output: Tensor,
    grad_log_sum_exp: Tensor,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = log_sum_exp.dtype
    wide_key, wide_value, upstream = key.to(dtype), value.to(dtype), grad_output.to(dtype)
    shift = grad_log_sum_exp - (upstream * output.to(dtype)).sum(-1)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for rows in _spans(query, key):
        weights = (_logits(query, wide_key, mask, rows, scale, is_causal) - log_sum_exp[..., rows, None]).exp()
        above = upstream[..., rows, :]
        grad_logits = scale * weights * (above @ wide_value.mT + shift[..., rows, None])
        grad_query[..., rows, :] = (grad_logits @ wide_key).to(query.dtype)
        grad_key += grad_logits.mT @ query[..., rows, :].to(dtype)
        grad_value += weights.mT @ above
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
