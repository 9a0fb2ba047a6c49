"""What a call would do, without doing it: the backend, the kernel behind it, and how exact it is.

Legend: B batch, H query heads, Hk key heads, Q queries, K keys, D score width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eotattn.attention import near_far, rebased
from eotattn.attention.backends import BACKENDS, Backend, choose
from eotattn.attention.call import AttentionCall
from eotattn.attention.masks import Masks
from eotattn.attention.measured import MEASURED_WIDTH, TIMES, Times, pattern_of
from eotattn.attention.operands import lanes_of
from eotattn.attention.token_bias import is_learned
from eotattn.checks import check_choice, require, speaking_as
from eotattn.compat import fused_attention_choice
from eotattn.kernels import log_sum_exp, sdpa

__all__ = ["Explanation", "explain"]

#: What a backend does, but for ``"sdpa"``, whose calls depend on the masks; and what becomes of a prior.
_WORDS = {
    "varlen": "one variable-length call that skips what is not seen",
    "flex": "one compiled call that skips blocks that are not seen",
    "reference": "dense tensor operations; Q x K weights in memory",
    "rebased": "stock calls over rectangles, which count biases and positions from close by, merged",
}
#: Backends whose fused calls carry priors in lanes.
IN_LANES = ("sdpa", "near_far", "rebased", "varlen")
#: Operators that return the log-sum-exp too, by their route.
_OPERATORS = {
    "cpu": "flash_attention",
    "cudnn": "cudnn_attention",
    "efficient": "efficient_attention",
    "blocks": "blocks of rows",
}
_PRIOR_WORDS = {
    "sdpa": "; the prior rides in lanes",
    "varlen": "; the prior rides in lanes",
    "flex": "; the prior is a score modification",
    "reference": "",
    "near_far": "",
    "rebased": "; the prior rides in lanes",
}
#: How the words about a backend begin that could serve the call too.
_SERVES = "would serve: "


@dataclass(frozen=True)
class Explanation:
    """Why a call is served as it is; prints as a few lines.

    Args:
        backend: Who would serve the call, or ``None`` if the backend asked for refuses.
        reason: Why this one.
        kernel: Kernel that PyTorch would pick for the fused call, e.g. ``"cudnn_attention"``; ``None`` elsewhere.
        head_dim: Width of the heads, without lanes.
        width: Score width of the fused call, lanes and padding to the kernel's step included.
        num_lanes: Lanes that the prior, biases of tokens and a padding mask occupy.
        error_bound: Largest error of the log-prior in the kernel's dtype, nats, beside the kernel's own rounding of
            the content; zero where the log-prior is dense. Of ``"rebased"``, at keys that have weight.
        times: How long this backend takes, as measured on one GPU; :data:`~eotattn.attention.measured.TIMES`.
        alternatives: The other backends, each with what it lacks, or with what it would do.
    """

    backend: str | None
    reason: str
    kernel: str | None
    head_dim: int
    width: int
    num_lanes: int
    error_bound: float
    times: Times | None
    alternatives: dict[str, str]

    def __str__(self) -> str:
        lines = [f"backend        {self.backend}: {self.reason}"]
        if self.kernel is not None:
            lines.append(f"kernel         {self.kernel}, width {self.width} of which {self.num_lanes} lanes")
        if self.kernel is not None or self.backend in ("near_far", "rebased"):
            lines.append(f"error bound    {self.error_bound:.1e} nats of the log-prior")
        if self.times is not None and self.times.forward is not None:
            setting = f"H200, bfloat16, 8192 tokens, heads of {MEASURED_WIDTH}"
            setting += "" if self.head_dim == MEASURED_WIDTH else f"; not at this call's {self.head_dim}"
            lines.append(f"measured       {self.times} of plain causal attention ({setting})")
        for name, why in self.alternatives.items():
            word = "or " if why.startswith(_SERVES) else "not "
            lines.append(f"{word + name:<15}{why.removeprefix(_SERVES)}")
        return "\n".join(lines)


@speaking_as("explain")
def explain(query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto", **options: Any) -> Explanation:
    """Say what :func:`prior_attention` would do with these arguments; nothing is attended.

    Args:
        query: (B, H, Q, D).
        key: (B, Hk, K, D).
        value: (B, Hk, K, V).
        backend: The backend asked for.
        options: Every other argument of :func:`prior_attention` except ``cache``, by its name there.

    Returns:
        An :class:`Explanation`; print it.

    Raises:
        ValueError: As :func:`prior_attention` does.
        TypeError: Likewise, and for arguments that it does not have.

    Example:
        >>> from eotattn.priors import RelativeBiasPrior
        >>> x = torch.ones(1, 2, 9, 8)
        >>> print(explain(x, x, x, prior=RelativeBiasPrior(2, 4)))
        backend        near_far: the log-prior in full within 4 tokens, by blocks; a constant a head beyond, in stock
        calls, merged
        error bound    0.0e+00 nats of the log-prior
        not sdpa       this prior has no lanes; use backend='near_far', 'reference' or 'flex'
        not rebased    it counts the positions of priors with lanes, the same for every sample
        not flex       it compiles for a GPU and the query is on cpu
        not varlen     it is a GPU kernel and the query is on cpu
        or reference   dense tensor operations; Q x K weights in memory, not measured
    """
    check_choice("explain", "backend", backend, ("auto", *BACKENDS))
    kept = options.get("cache") is None
    require(kept, "explain", "cache", "be left out", options.get("cache"), "Pass the keys and positions that it holds")
    call = AttentionCall.from_arguments(query, key, value, **options)
    wanted = choose(call) if backend == "auto" else BACKENDS[backend]
    refused, head_dim = wanted.refusal(call), call.query.shape[-1]
    pattern = pattern_of(call.masks, call.query.shape[2], has_prior=call.has_log_prior)
    times = TIMES[pattern]
    if pattern == "whole" and not call.has_log_prior:
        times = dict.fromkeys(times, Times(None, None))  # measured with a prior alone
    others = {
        name: BACKENDS[name].refusal(call) or f"{_SERVES}{_words(name, call)}, {times[name]}"
        for name in times
        if name != wanted.name
    }
    if refused:
        reason = f"{wanted.name} cannot serve the call with {call.prior_name}: {refused}"
        return Explanation(None, reason, None, head_dim, head_dim, 0, 0.0, None, others)
    is_near_far = wanted.name == "near_far"
    parts = {"near_far": near_far.far_calls, "rebased": rebased.calls}
    fused = parts[wanted.name](call) if wanted.name in parts else [call]
    each = [lanes for one in fused if (lanes := lanes_of(one)) is not None] if wanted.name in IN_LANES else []
    num_lanes = max((lanes.num_lanes for lanes in each), default=0)
    if wanted.name in IN_LANES:
        num_lanes += call.masks.padding is not None and call.masks.dense is None
        num_lanes += not is_near_far and is_learned(call.query_bias)
    width = head_dim + num_lanes
    width = sdpa.kernel_width(width, call.query.device) if num_lanes else width
    return Explanation(
        backend=wanted.name,
        reason=_words(wanted.name, call),
        kernel=_kernel(wanted, call, width),
        head_dim=head_dim,
        width=width,
        num_lanes=num_lanes,
        error_bound=max((lanes.error_bound for lanes in each), default=0.0) * call.scale
        + (near_far.far_error(call) if is_near_far else 0.0),
        times=times[wanted.name],
        alternatives=others,
    )


def _words(name: str, call: AttentionCall) -> str:
    """What backend ``name`` would do with the call."""
    calls = (
        _sdpa_words(call.masks) if name == "sdpa" else near_far.describe(call) if name == "near_far" else _WORDS[name]
    )
    calls += _PRIOR_WORDS[name] if call.has_log_prior else ""
    return calls if call.sinks is None else calls + "; sinks are joined by the log-sum-exp"


def _sdpa_words(masks: Masks) -> str:
    """How stock calls serve these masks."""
    if masks.documents is not None:
        return f"{len(masks.documents.lengths)} fused calls, one a document"
    if masks.band is not None and masks.band.window is not None:
        return "fused calls over blocks of the window"
    if masks.dense is not None or (masks.band is not None and not masks.band.is_triangle):
        return "one fused call with a Q x K mask"
    return "one fused call"


def _kernel(backend: Backend, call: AttentionCall, width: int) -> str | None:
    """Name of the kernel behind a fused call with operands of ``width``."""
    if backend.name != "sdpa":
        return "varlen_attn" if backend.name == "varlen" else None
    query, key, value = call.query, call.key, call.value
    if call.needs_lse:
        wide, masks = query.new_empty(*query.shape[:-1], width), call.masks.dense
        return _OPERATORS[log_sum_exp.route(wide, value, masks, with_gradient=call.follows_gradients)]
    if query.device.type == "cpu" and value.shape[-1] < width:
        value = value.new_empty(*value.shape[:-1], width)  # as the call itself pads it
    plain = call.masks.triangle or (call.masks.band is None and call.masks.dense is None)
    mask = None
    if not plain and call.masks.documents is None:
        seen = torch.ones((), dtype=torch.bool, device=query.device)
        mask = call.dense_mask() if call.masks.dense is not None else seen.expand(query.shape[2], key.shape[2])
    return fused_attention_choice(
        query.new_empty(*query.shape[:-1], width),
        key.new_empty(*key.shape[:-1], width),
        value,
        attn_mask=mask,
        dropout_p=call.dropout_p,
        is_causal=call.masks.triangle,
        scale=call.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
