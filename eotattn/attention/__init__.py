"""Attention with priors: :func:`prior_attention`, the layers, rotary content, a cache, what a call would do.

Conventions:

- **Positions are explicit**: ``(L,)``, one row a sample ``(B, L)``, a list, a ``range``, or the first of consecutive
  ones. Causality is defined by positions, not by indices; caches, chunks, shards and packing are offsets.
- **Layout**: layers read (B, length, E) unless ``batch_first=False`` is said; ``nn.MultiheadAttention`` reads
  (length, B, E) unless told otherwise, and ``PriorAttention.from_multihead_attention`` takes its setting over.
- ``backend="auto"`` takes the fastest backend that can serve a call, as measured. One asked for by name is used or
  refused. :func:`explain` says what would be used, why, and how exactly.
- **A query without admissible keys** gets output, weights and gradients zero. In floating masks -inf and the lowest
  number of the dtype hide a key.
- **Floating masks keep their precision**: one of the key alone becomes lanes; one of pairs that a 16-bit kernel would
  round takes the reference instead, and :func:`explain` says so.
- ``window=`` hides keys that many tokens back (causal calls); ``documents=PackedDocuments(lengths)`` keeps packed
  documents apart, at positions from 0.
- **Appended keys** (``add_bias_kv``, ``add_zero_attn``) stand before the first token, at positions -N to -1. They are
  sinks that the prior does not touch: their log-prior is zero for every query, and tokens count from 0.
- **Statistics store no weights.** On CUDA two kernel sweeps compute all of them; elsewhere blocks of rows do.
- The content of a call is not searched for NaN, which would cost a pass over it: PyTorch's fused kernel on a CPU turns
  a NaN query row into zeros, the reference keeps it.
- PyTorch's ``context_parallel`` shares a call between GPUs as it is: priors, rotary content, grouped queries and biases
  of keys need nothing more, and positions may be left out. What it cannot share (documents, sinks, masks) goes shard by
  shard with ``return_lse`` and :func:`merge`.
- :class:`StaticCache` counts its tokens on the device, so that one recorded graph
  (``torch.compile(step, mode="reduce-overhead", fullgraph=True)``) is every step of decoding; caches keep content in 8
  bits with ``store=``, and lanes as they are.
- :class:`StreamingCache` keeps the first and the most recent tokens of an endless text, and bounds what all others
  would have weighed.
- With FSDP2 call ``fully_shard(layer.prior)`` before what holds it gets a mixed-precision policy; with accelerate's
  offloading pass ``preload_module_classes=["PriorAttention"]``.
"""

from eotattn.attention.attention_sinks import AttentionSinks
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.explanation import Explanation, explain
from eotattn.attention.functional import prior_attention
from eotattn.attention.layer.goat_attention import GoatAttention
from eotattn.attention.layer.prior_attention_layer import PriorAttention
from eotattn.attention.layer.rotary import Rotary
from eotattn.attention.merging import merge
from eotattn.attention.static_cache import StaticCache
from eotattn.attention.streaming_cache import StreamedAttention, StreamingCache

__all__ = [
    "AttentionSinks",
    "Explanation",
    "GoatAttention",
    "KeyValueCache",
    "PackedDocuments",
    "PriorAttention",
    "Rotary",
    "StaticCache",
    "StreamedAttention",
    "StreamingCache",
    "explain",
    "merge",
    "prior_attention",
]
