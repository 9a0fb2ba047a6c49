"""PriorAttention: projections around :func:`prior_attention`, called like ``nn.MultiheadAttention``.

Legend: B batch, E model width, H query heads, Hk key heads, Q queries, K keys, D content width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from eotattn.attention.attention_sinks import AttentionSinks, SinkKeys
from eotattn.attention.backends import BACKENDS
from eotattn.attention.cache import KeyValueCache
from eotattn.attention.documents import PackedDocuments
from eotattn.attention.functional import prior_attention
from eotattn.attention.layer.conversion import (
    NO_FUSED_ENCODER,
    as_batch,
    as_positions,
    multihead_arguments,
    multihead_state,
)
from eotattn.attention.layer.output_gate import KINDS, OutputGate
from eotattn.attention.layer.projected_heads import Heads, ProjectedHeads
from eotattn.attention.layer.rotary import Rotary
from eotattn.attention.masks import from_multihead_convention
from eotattn.attention.static_cache import StaticCache
from eotattn.checks import check_choice, check_floating, check_positive_int, check_probability, fail, require
from eotattn.compat import first_parameter
from eotattn.kernels.sdpa import WIDTH_STEP
from eotattn.priors import LogPrior, Reading, Tokens
from eotattn.priors.base import check_prior
from eotattn.priors.reading import join_readings

__all__ = ["Heads", "PriorAttention", "num_reserved"]

#: Backends of a layer that returns weights where the caller does not say.
WITH_WEIGHTS = ("auto", "reference")


class PriorAttention(ProjectedHeads):
    """Multi-head attention with a log-prior: MHA, GQA or MQA, self- or cross-attention.

    It is called like ``nn.MultiheadAttention`` and returns the same pair, so ``nn.TransformerEncoderLayer`` can hold it
    as ``self_attn``. Differences: the layout is always said (below), ``key`` and ``value`` default to ``query``,
    ``is_causal`` needs no mask beside it, a query without admissible keys gets zeros instead of NaN, and what stood
    beside the tokens there (``add_bias_kv``, ``add_zero_attn``) is a matter of ``sinks``, which returned weights omit.

    Layout, one rule: inputs are (B, length, E) unless ``batch_first=False`` is said; ``nn.MultiheadAttention`` and
    ``nn.TransformerEncoderLayer`` read (length, B, E) unless told otherwise. Shapes do not tell the two apart, and the
    wrong one attends over the batch: :meth:`from_multihead_attention` takes over what the other layer was told.

    Args:
        embed_dim: Model width E.
        num_heads: Query heads H; E must be a multiple.
        num_kv_heads: Key and value heads Hk, a divisor of H; by default H.
        kdim: Width of ``key`` inputs; by default E.
        vdim: Width of ``value`` inputs; by default E.
        prior: Log-prior with H heads; ``None`` for plain attention.
        rotary: :class:`Rotary` for queries and keys; composes with any prior.
        lanes: ``"appended"`` leaves the content the whole head width E / H and widens the fused call; ``"reserved"``
            takes the prior's lanes out of the head width, so that the call stays as wide as the head. (Key lanes that
            differ between query heads, as those of u(j), are not reserved a second time for query heads that share a
            key head: there, and with padding, the call is a few lanes wider.) No projection row is dead either way:
            projections are as wide as the content.
        lane_dtype: Dtype that the layer will attend in, which decides how many lanes are reserved: 16-bit dtypes take
            several for each float32 one, to be as exact, and a multiple of 8 in all. A layer that runs in another dtype
            stays right, but spills over the head width (fewer lanes reserved than it needs) or leaves some unused.
        window: Keys that a query sees at most, itself included; calls are then causal ones.
        dropout: Probability of dropping a weight in training.
        bias: Whether the projections have biases.
        sinks: :class:`AttentionSinks`, which queries may attend to instead of any token; no prior, mask or cache
            reaches them. Registers are as wide as the layer's ``content_dim``, their values as ``head_dim``.
        output_gate: ``"elementwise"`` or ``"head"``: an :class:`OutputGate` by which the input of each query scales
            the output of its heads, before the output projection.
        batch_first: Whether inputs are (B, length, E) rather than (length, B, E).
        backend: As in :func:`prior_attention`.
        device: Device of the parameters, those of the prior too.
        dtype: Dtype of the projections; the prior keeps its own.

    Example:
        >>> from eotattn.priors import RecencyPrior
        >>> layer = PriorAttention(16, num_heads=4, prior=RecencyPrior(4), batch_first=True)
        >>> output, weights = layer(torch.ones(2, 5, 16), is_causal=True, need_weights=False)
        >>> output.shape
        torch.Size([2, 5, 16])
    """

    # nn.TransformerEncoder and its layers read these to decide that their own fused path does not apply.
    in_proj_bias = None
    in_proj_weight = NO_FUSED_ENCODER
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        prior: LogPrior | None = None,
        rotary: Rotary | None = None,
        lanes: str = "appended",
        lane_dtype: torch.dtype = torch.float32,
        window: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        sinks: AttentionSinks | None = None,
        output_gate: str | None = None,
        batch_first: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner, make = type(self).__name__, dict[str, Any](device=device, dtype=dtype)
        remedy = "Pass False for (length, B, E), which nn.MultiheadAttention has by default"
        is_said = isinstance(batch_first, bool)
        require(is_said, owner, "batch_first", "be true or false", batch_first, remedy, error=TypeError)
        if prior is not None:
            check_prior(owner, "prior", prior)
            rule, have = f"have {num_heads} heads", prior.num_heads
            require(have == num_heads, owner, "prior", rule, have, "Build it for query heads")
            prior = prior if device is None else prior.to(device=device)
        widths: dict[str, Any] = {"num_kv_heads": num_kv_heads, "kdim": kdim, "vdim": vdim}
        reserved = num_reserved(owner, prior, lanes, lane_dtype)
        super().__init__(embed_dim, num_heads, **widths, reserved=reserved, rotary=rotary, bias=bias, **make)
        self.backend = check_choice(owner, "backend", backend, ("auto", *BACKENDS))
        self.window = None if window is None else check_positive_int(owner, "window", window)
        self.lanes, self.dropout, self.batch_first = lanes, check_probability(owner, "dropout", dropout), batch_first
        self.scale = 1 / math.sqrt(self.content_dim)
        self.prior = prior  # not reset: it may come trained
        self.output_gate: OutputGate | None = None
        if output_gate is not None:
            check_choice(owner, "output_gate", output_gate, KINDS)
            sizes = (embed_dim, num_heads, self.head_dim)
            self.output_gate = OutputGate(*sizes, kind=output_gate, bias=bias, **make)
        self.sinks = None if sinks is None else self._checked_sinks(owner, sinks)
        if self.sinks is not None and (device is not None or dtype is not None):
            self.sinks.to(**make)

    def reset_parameters(self) -> None:
        """Initialise the projections as ``nn.MultiheadAttention`` does (Xavier, zero biases); reset the prior."""
        self.reset_projections()
        for part in (self.sinks, self.output_gate):
            if part is not None:
                part.reset_parameters()
        if self.prior is not None:
            self.prior.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_positions: Tensor | ArrayLike | range | None = None,
        key_positions: Tensor | ArrayLike | range | None = None,
        documents: PackedDocuments | None = None,
        cache: KeyValueCache | None = None,
        key_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the arguments up to ``is_causal`` are those of ``nn.MultiheadAttention``, in its order.

        Args:
            query: (B, Q, E) if ``batch_first``, else (Q, B, E); or (Q, E).
            key: Likewise with K and ``kdim``; by default ``query``.
            value: Likewise with K and ``vdim``; by default ``key``.
            key_padding_mask: (B, K), true where a key is padding; floating ones are added to the score (not with a
                cache, which has to know what is padding).
            need_weights: Return the weights; this takes the dense path. Pass false for speed. By default true, as in
                ``nn.MultiheadAttention``, unless the layer was given a backend that has no weights.
            attn_mask: (Q, K), (B * H, Q, K) or (B, H, Q, K); boolean with true where a query may *not* attend, or
                floating and added to the score, nats.
            average_attn_weights: Return weights averaged over the heads.
            is_causal: Keys at later positions than the query are inadmissible.
            query_positions: (Q,) or (B, Q), tokens: a tensor, an array, a list, a ``range``, or the position of the
                first token; by default 0, 1, 2, ...
            key_positions: (K,) or (B, K), likewise; by default those of the query where ``key`` is left out or is the
                same object, else 0, 1, 2, ...
            documents: Documents packed into the batch; each attends to itself alone, at positions from 0 on.
            cache: Earlier keys and values of this layer; the new ones are appended to it, positions follow from it, and
                ``key_padding_mask`` speaks of the new tokens. For inference: no gradient reaches cached tensors.
            key_bias: (B, H, K), (B, Hk, K) or (B, 1, K), nats, added to every score of a key, and to what the prior
                reads; with a cache, of the new tokens.

        Returns:
            Output shaped like ``query``, and the weights (B, Q, K) or (B, H, Q, K), or ``None``.
        """
        owner = type(self).__name__
        key = query if key is None else key
        value = key if value is None else value
        inputs = self._inputs(query, key, value)
        if cache is not None and isinstance(key_padding_mask, Tensor) and key_padding_mask.is_floating_point():
            rule, remedy = "be boolean with a cache, which keeps it for later calls", "Compare it with zero"
            fail(owner, "key_padding_mask", rule, key_padding_mask, remedy, error=TypeError)
        mask = padding = None
        if attn_mask is not None or key_padding_mask is not None:
            mask, padding = from_multihead_convention(
                owner, attn_mask, key_padding_mask, batch=inputs[0].shape[0], num_heads=self.num_heads
            )
        key_positions = query_positions if key is query and key_positions is None else key_positions
        at: tuple[Any, Any] = (None, None)
        if not (query_positions is key_positions is documents is cache is None):
            at = self._positions(inputs, query_positions, key_positions, padding, documents, cache)
        content = self.project(*inputs, query_positions=at[0], key_positions=at[1])
        prior, reading = self.prior, Reading(key_bias=key_bias)
        if prior is not None and prior.reads_tokens:
            reading = self._read(prior, inputs, padding, documents, cache, key_bias)
        if documents is not None or cache is not None:
            at = (None, None)  # they say it themselves
        result = prior_attention(
            *content,
            prior=prior,
            query_positions=at[0],
            key_positions=at[1],
            attn_mask=mask,
            key_padding_mask=padding,
            is_causal=is_causal,
            window=self.window,
            documents=documents,
            cache=cache,
            sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=self.backend in WITH_WEIGHTS if need_weights is None else need_weights,
            backend=self.backend,
            key_bias=reading.key_bias,
            query_bias=reading.query_bias,
            query_gains=reading.query_gains,
        )
        if cache is not None and reading.kept is not None:
            cache.keep(reading.kept)
        heads, weights = result if isinstance(result, tuple) else (result, None)
        gate = self.output_gate
        heads = heads if gate is None else gate(heads, inputs[0])
        output: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if query.dim() == 2:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _read(
        self,
        prior: LogPrior,
        inputs: tuple[Tensor, Tensor, Tensor],
        padding: Tensor | None,
        documents: PackedDocuments | None,
        cache: KeyValueCache | None,
        key_bias: Tensor | None,
    ) -> Reading:
        """What the prior reads from the inputs, and the bias that the caller adds."""
        query, key, _ = inputs
        of_documents = None if documents is None else documents.positions(key.shape[0], key.shape[1], key.device)
        before = None if cache is None else cache.kept
        reading = prior.read_tokens(Tokens(query, key, padding, of_documents, before))
        return reading if key_bias is None else join_readings([Reading(key_bias=key_bias), reading])

    def _inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Checked inputs as (B, length, width)."""
        owner = type(self).__name__
        for name, side in (("query", query), ("key", key), ("value", value)):
            if side is query and name != "query":
                continue
            check_floating(owner, name, side)
            if side.is_nested:
                rule, remedy = "be padded", "Pad it, in nn.TransformerEncoder by enable_nested_tensor=False"
                fail(owner, name, rule, "a nested tensor", remedy, error=TypeError)
        is_batched = query.dim() == 3
        if query.dim() not in (2, 3):
            fail(owner, "query", "have two or three axes", query, "Add or drop the batch axis")
        inputs = (query, key, value)
        if not is_batched or not self.batch_first:
            inputs = as_batch(query, key, value, is_batched=is_batched, batch_first=bool(self.batch_first))
        self.check_widths(*inputs)
        prior = self.prior
        if prior is not None:
            _make_ready(owner, prior, query.device)
        return inputs

    def _positions(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        query_positions: Any,
        key_positions: Any,
        padding: Tensor | None,
        documents: PackedDocuments | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor | range | None, Tensor | range | None]:
        """Positions of the tokens of both sides."""
        owner, (batch, length, _) = type(self).__name__, inputs[0].shape
        if documents is None and cache is None:
            of_query = as_positions(owner, "query_positions", query_positions, inputs[0])
            if key_positions is query_positions and inputs[1] is inputs[0]:
                return of_query, of_query
            return of_query, as_positions(owner, "key_positions", key_positions, inputs[1])
        place = "documents" if cache is None else "the cache"
        for name, given in (("query_positions", query_positions), ("key_positions", key_positions)):
            require(given is None, owner, name, f"be left to {place}", given, "Drop the positions")
        if cache is not None:
            positions: Tensor | range = cache.next_positions(length, padding)
        elif documents is not None:
            documents.check(owner, batch, length)
            positions = documents.positions(batch, length, inputs[0].device)
        return positions, positions

    def make_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        is_static: bool = False,
        store: torch.dtype | None = None,
    ) -> KeyValueCache:
        """An empty :class:`KeyValueCache` for this layer and its prior, ``max_length`` tokens long.

        Args:
            batch_size: Samples B.
            max_length: Tokens to allocate.
            dtype: Dtype of keys and values; by default that of the output projection.
            device: Device of the storage, likewise; to be given where weights are loaded call by call.
            is_static: Make a :class:`StaticCache`, whose steps one recorded graph serves.
            store: Dtype of 8 bits to keep content in, as in :class:`KeyValueCache`.
        """
        weight = self.out_proj.weight
        dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
        rule, remedy, owner = "be where the layer computes", "Pass the device of the input", type(self).__name__
        require(device.type != "meta", owner, "device", rule, str(device), remedy)
        if self.prior is not None:
            _make_ready(owner, self.prior, device)
        sizes = (batch_size, self.num_kv_heads, max_length, self.content_dim, self.head_dim)
        kind = StaticCache if is_static else KeyValueCache
        return kind(*sizes, prior=self.prior, dtype=dtype, device=device, store=store)

    def _checked_sinks(self, owner: str, sinks: AttentionSinks) -> AttentionSinks:
        """The sinks, once they fit heads and widths."""
        remedy = "Pass e.g. AttentionSinks.logit(num_heads)"
        known = isinstance(sinks, AttentionSinks)
        require(known, owner, "sinks", "be AttentionSinks", sinks, remedy, error=TypeError)
        device = next((parameter.device for parameter in sinks.parameters()), torch.device("cpu"))
        shapes = ((1, self.num_heads, 1, self.content_dim), (1, self.num_kv_heads, 1, self.head_dim))
        query, value = (torch.empty(shape, device=device) for shape in shapes)
        SinkKeys.of(owner, sinks).check(owner, query, value)
        return sinks

    @classmethod
    def from_multihead_attention(
        cls, attention: nn.MultiheadAttention, *, prior: LogPrior | None = None, backend: str = "auto"
    ) -> PriorAttention:
        """A layer with the weights of ``attention``; equal to it while the prior is neutral.

        Args:
            attention: The layer to convert; not changed.
            prior: Log-prior with as many heads, its lanes appended, so that no content is lost.
            backend: As in :func:`prior_attention`.
        """
        is_known, remedy = isinstance(attention, nn.MultiheadAttention), "Build other layers by hand"
        rule = "be an nn.MultiheadAttention"
        require(is_known, cls.__name__, "attention", rule, type(attention).__name__, remedy, error=TypeError)
        layer = PriorAttention(**multihead_arguments(attention), prior=prior, backend=backend)
        layer.load_state_dict(multihead_state(attention), strict=False)
        return layer.train(attention.training)

    def extra_repr(self) -> str:
        """The numbers that define the layer."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


def _make_ready(owner: str, prior: nn.Module, device: torch.device) -> None:
    """Gather a prior that was sharded by itself; raise if who moved or cast the layer left its numbers unfit.

    Priors are read, not called, so that no hook of a sharding or offloading library would do it.
    """
    unshard: Callable[[], Any] | None = getattr(prior, "unshard", None)
    if unshard is not None:
        unshard()
    parameter = first_parameter(prior)  # all are treated alike
    if parameter is not None and parameter.device != device:
        remedy = f"Move the layer, or have offloading load it whole: preload_module_classes=[{owner!r}]"
        fail(owner, "prior", f"be on {device}", parameter, remedy)
    if parameter is not None and parameter.dtype.itemsize < 4:
        remedy = "Shard it alone, with fully_shard(layer.prior), before a policy is given to what holds it"
        fail(owner, "prior", "keep its 32-bit parameters", parameter, remedy, error=TypeError)


def num_reserved(owner: str, prior: LogPrior | None, lanes: str, lane_dtype: torch.dtype) -> int:
    """Columns of a head that the prior takes."""
    check_choice(owner, "lanes", lanes, ("appended", "reserved"))
    if lanes == "appended" or prior is None:
        idle = lane_dtype == torch.float32
        require(idle, owner, "lane_dtype", "be left alone where no lanes are reserved", lane_dtype, "Drop it")
        return 0
    require(prior.has_lanes, owner, "prior", "have lanes to reserve", type(prior).__name__, "Use lanes='appended'")
    known = isinstance(lane_dtype, torch.dtype) and lane_dtype.is_floating_point
    require(known, owner, "lane_dtype", "be a floating dtype", lane_dtype, "Pass e.g. torch.bfloat16", error=TypeError)
    num_lanes = prior.num_lanes(lane_dtype) + prior.biases_keys  # one that gradients of biases come back in
    step = WIDTH_STEP if lane_dtype.itemsize < 4 else 1  # so that every row of the content is read in whole words
    return -(-num_lanes // step) * step
