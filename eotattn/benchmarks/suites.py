"""Suites: what ``eotattn bench`` can run, one function each, from a configuration to rows.

Legend: B batch, H heads, L tokens, D head width, E model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention import PriorAttention, prior_attention
from eotattn.benchmarks import peers
from eotattn.benchmarks.oracle import causal_rows, relative_error, slope_gradient
from eotattn.benchmarks.timing import Candidate, Row, measure
from eotattn.checks import check_choice
from eotattn.kernels import log_sum_exp
from eotattn.priors import LogPrior, RecencyPrior, SinkPrior, goat_prior

__all__ = ["SUITES", "Configuration", "configure"]


@dataclass(frozen=True)
class Configuration:
    """How a suite is run.

    Args:
        device: Where.
        dtype: Name of the dtype of content.
        sizes: ``"small"`` (seconds on a CPU) or ``"full"`` (the project's bounds, on a GPU).
        rounds: Timed calls of each candidate.
        seed: Seed of all random numbers.
    """

    device: str = "cpu"
    dtype: str = "float32"
    sizes: str = "small"
    rounds: int = 20
    seed: int = 0

    @property
    def place(self) -> dict[str, Any]:
        """Keywords that put a tensor there."""
        return {"device": torch.device(self.device), "dtype": getattr(torch, self.dtype)}

    def pick(self, small: Sequence[Any], full: Sequence[Any]) -> Sequence[Any]:
        """The sizes to run."""
        return small if self.sizes == "small" else full


def configure(device: str, dtype: str, sizes: str, rounds: int, seed: int = 0) -> Configuration:
    """Check and make a :class:`Configuration`."""
    check_choice("bench", "dtype", dtype, ("float32", "bfloat16", "float16"))
    check_choice("bench", "sizes", sizes, ("small", "full"))
    return Configuration(device, dtype, sizes, rounds, seed)


def _trained(prior: LogPrior, config: Configuration, *, size: float = 0.5) -> LogPrior:
    """The prior away from its start, as training leaves it; slopes stay at least a tenth of ALiBi's."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            step = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + step).clamp(min=0.1) if name.endswith("strength") else parameter + step)
    return prior.to(config.place["device"])


def _gpt(num_heads: int) -> LogPrior:
    """Recency and sink: what the reference package's GPT factory has."""
    return RecencyPrior(num_heads) + SinkPrior(num_heads)


def _content(config: Configuration, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed + sum(shape))
    return torch.randn(shape, generator=generator).to(**config.place).requires_grad_()


def attention(config: Configuration) -> list[Row]:
    """The fused call with a prior against other ways to have one: forward, and forward and backward."""
    rows: list[Row] = []
    for batch, heads, length, width in config.pick([(1, 2, 64, 32)], [(2, 16, 8192, 64), (2, 8, 8192, 128)]):
        size = {"batch": batch, "heads": heads, "length": length, "width": width}
        for direction in ("forward", "forward+backward"):
            candidates = list(_attention_candidates(config, batch, heads, length, width, direction))
            rows += [{**size, "pass": direction, **row} for row in _measure(candidates, config)]
    return rows


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _attention_candidates(
    config: Configuration, batch: int, heads: int, length: int, width: int, direction: str
) -> Iterable[Candidate]:
    dtype, device = config.place["dtype"], config.place["device"]
    shape = (batch, heads, length)
    content = [_content(config, *shape, width) for _ in range(3)]
    upstream = torch.randn_like(content[2])
    rows = torch.arange(length - min(64, length), length, device=device)

    def candidate(
        name: str, make: Callable[[], Attend], prior: LogPrior | None, learned: Sequence[Tensor] = (), more: int = 0
    ) -> Candidate:
        inputs = list(content)
        if more:  # columns of zeros after, or columns fewer of, queries and keys
            inputs[:2] = [functional.pad(tensor.detach(), (0, more)).requires_grad_() for tensor in inputs[:2]]
        scale = 1 / math.sqrt(width + min(more, 0))
        made = cache(make)

        def prepare() -> Callable[[], Any]:
            attend = made()
            if direction == "forward":
                return partial(_without_gradient, attend, inputs)
            wanted = [*inputs, *(learned if prior is None else prior.parameters())]
            return lambda: torch.autograd.grad(attend(*inputs), wanted, upstream)

        def error() -> float:
            query, key, value = (tensor.detach() for tensor in inputs)
            expected = causal_rows(query, key, value, rows, prior, scale)
            return relative_error(_without_gradient(made(), inputs)[0, :, rows], expected)

        return Candidate(name, prepare, error if direction == "forward" else None)

    yield candidate("SDPA, no prior", lambda: _plain, None)
    for name, prior in (("recency + sink", _gpt(heads)), ("GOAT, 4 frequencies", goat_prior(heads, num_frequencies=4))):
        _trained(prior, config)
        lanes, ours = prior.num_lanes(dtype), partial(partial, _fused, prior)
        if lanes < width:
            yield candidate(f"eotattn, {name}, reserved", ours, prior, more=-lanes)
        yield candidate(f"eotattn, {name}, appended", ours, prior)
        if name != "recency + sink":
            wide = -(-(width + lanes) // 8) * 8 - width
            yield candidate(
                f"SDPA alone, {wide} columns more", lambda: partial(_plain, scale=1 / math.sqrt(width)), None, more=wide
            )
            yield candidate(f"FlashBias as SDPA, {name}", partial(partial, _flashbias, prior), prior)
    yield candidate("RoPE, eager", partial(_rotated, width, length, device), None)
    if config.device != "cpu":
        recency = _trained(RecencyPrior(heads), config)
        yield candidate("FlexAttention, causal", partial(peers.flex, None, length, device), None)
        bias = torch.zeros(length, device=device, requires_grad=True)
        key_bias = partial(peers.flex, _KeyBias(bias), length, device)
        yield candidate("FlexAttention, learnable key bias", key_bias, None, [bias])
        yield candidate("FlexAttention, learnable slopes", partial(peers.flex, recency, length, device), recency)
    dense = torch.zeros(heads, length, length, **config.place).masked_fill_(
        torch.ones(length, length, dtype=torch.bool, device=device).triu(1), float("-inf")
    )
    dense.requires_grad_(direction != "forward")
    yield candidate("dense learnable bias", lambda: partial(_with_bias, dense), None, [dense])


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def _fused(prior: LogPrior, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _output(prior_attention(query, key, value, prior=prior, is_causal=True, backend="sdpa"))


def _flashbias(prior: LogPrior, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return peers.flashbias(query, key, value, prior)


def _with_bias(bias: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return peers.dense_bias(query, key, value, bias)


def _rotated(width: int, length: int, device: torch.device) -> Attend:
    rotary, positions = peers.Rotary(width), torch.arange(length, device=device)
    return lambda q, k, v: _plain(rotary(q, positions), rotary(k, positions), v)


class _KeyBias:
    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def score_mod(self) -> Callable[..., Tensor]:
        bias = self.bias
        return lambda score, b, h, q, k: score + bias[k]


def _output(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _without_gradient(attend: Attend, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*inputs)


def _measure(candidates: Sequence[Candidate], config: Configuration) -> list[Row]:
    return measure(candidates, device=torch.device(config.device), rounds=config.rounds)


def layer(config: Configuration) -> list[Row]:
    """A whole layer, forward and backward, against the bare layer; eager and, on a GPU, compiled."""
    rows: list[Row] = []
    for batch, length, width, heads in config.pick([(1, 128, 64, 2)], [(8, 2048, 768, 12), (2, 8192, 1024, 16)]):
        x = _content(config, batch, length, width)
        layers = _layers(config, width, heads)
        candidates = [Candidate(name, partial(_step, make, x)) for name, make in layers.items()]
        if config.device != "cpu":
            for name in ("bare", "eotattn, recency + sink, reserved"):
                compiled = partial(_compiled, layers[name])
                candidates.append(Candidate(f"{name}, compiled", partial(_step, compiled, x)))
        size = {"batch": batch, "length": length, "width": width, "heads": heads, "pass": "forward+backward"}
        rows += [{**size, **row} for row in _measure(candidates, config)]
    return rows


def _layers(config: Configuration, width: int, heads: int) -> dict[str, Callable[[], Any]]:
    dtype, device = config.place["dtype"], config.place["device"]

    def ours(prior: LogPrior | None, **keywords: Any) -> Callable[[], Any]:
        if keywords.get("lanes") == "reserved":
            keywords["lane_dtype"] = dtype
        return lambda: _Ours(PriorAttention(width, heads, prior=prior, bias=False, **keywords).to(**config.place))

    made: dict[str, Callable[[], Any]] = {
        "bare": lambda: peers.BareLayer(width, heads).to(**config.place),
        "eotattn, no prior": ours(None),
        "eotattn, recency + sink, reserved": ours(_gpt(heads), lanes="reserved"),
        "eotattn, GOAT, 4 frequencies, reserved": ours(goat_prior(heads, num_frequencies=4), lanes="reserved"),
        "eotattn, GOAT, 4 frequencies, appended": ours(goat_prior(heads, num_frequencies=4)),
        "RoPE, eager": lambda: peers.BareLayer(width, heads, rotary=True).to(**config.place),
        "goat-attention": lambda: peers.GoatLayer(width, heads, dtype).to(device),
    }
    return made


class _Ours(torch.nn.Module):
    """A :class:`PriorAttention` called like the other layers here."""

    def __init__(self, layer: PriorAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        return self.layer(x, key_padding_mask=padding, is_causal=True, need_weights=False)[0]


def _compiled(make: Callable[[], Any]) -> Any:
    module = make()
    compiled: Any = torch.compile(module, fullgraph=True)
    compiled.parameters = module.parameters
    return compiled


def _step(make: Callable[[], Any], x: Tensor, mask: Tensor | None = None) -> Callable[[], Any]:
    """Forward and backward of a layer."""
    module = make()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    upstream = torch.randn_like(x)
    keywords = {} if mask is None else {"padding": mask}
    return lambda: torch.autograd.grad(module(x, **keywords), [x, *parameters], upstream, allow_unused=True)


def padding(config: Configuration) -> list[Row]:
    """The same layers with and without a padding mask; the baseline is the same layer without."""
    rows: list[Row] = []
    for batch, length, width, heads in config.pick([(2, 64, 64, 2)], [(8, 2048, 768, 12), (2, 8192, 1024, 16)]):
        x = _content(config, batch, length, width)
        mask = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
        mask[0, length - length // 4 :] = True
        layers = _layers(config, width, heads)
        size = {"batch": batch, "length": length, "width": width, "heads": heads, "pass": "forward+backward"}
        for name in ("bare", "eotattn, recency + sink, reserved", "goat-attention"):
            candidates = [
                Candidate(f"{name}{suffix}", partial(_step, layers[name], x, given))
                for suffix, given in ((", unpadded", None), (", padded", mask))
            ]
            rows += [{**size, **row} for row in _measure(candidates, config)]
    return rows


def decode(config: Configuration) -> list[Row]:
    """One new token against a cache, grouped queries: the attention of a decoding step."""
    rows: list[Row] = []
    for batch, heads, kv_heads, length, width in config.pick(
        [(1, 4, 2, 64, 16)], [(8, 32, 8, 2048, 128), (8, 32, 8, 32768, 128)]
    ):
        query = _content(config, batch, heads, 1, width).detach()
        key, value = (_content(config, batch, kv_heads, length, width).detach() for _ in range(2))
        prior = _trained(_gpt(heads), config)
        at: dict[str, Any] = {"query_positions": range(length - 1, length), "key_positions": range(length)}

        inputs = (query, key, value)
        bare = partial(functional.scaled_dot_product_attention, *inputs, enable_gqa=True)
        door = partial(prior_attention, *inputs, is_causal=True, backend="sdpa", **at)
        candidates = [
            Candidate("SDPA, no prior", partial(_given, bare)),
            Candidate("eotattn, no prior", partial(_given, door)),
            Candidate("eotattn, recency + sink, appended", partial(_given, partial(door, prior=prior))),
        ]
        with torch.inference_mode():
            found = _measure(candidates, config)
        size = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "length": length, "width": width}
        rows += [{**size, "pass": "decode", **row} for row in found]
    return rows


def _given(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def precision(config: Configuration) -> list[Row]:
    """How exact: total variation of the recency prior, and outputs with the GOAT prior, against float64."""
    lengths = config.pick([256], [2048, 8192, 32768, 131072, 1048576])
    rows = [row for length in lengths for row in _total_variation(config, length)]
    for length in config.pick([256], [2048, 8192, 32768, 131072]):
        rows += _output_errors(config, length)
    return rows


def _total_variation(config: Configuration, length: int, heads: int = 12, num_rows: int = 256) -> list[Row]:
    """TV of the recency prior on the last rows to the exact one, by the scores that the fused kernel itself computes.

    A problem of one key has that key's score as its log-sum-exp, which kernels return in fp32. Scores of the last keys
    are read so; earlier keys come as one problem, and their exact mass is below 1e-9 for every ALiBi slope.
    """
    device, dtype = config.place["device"], config.place["dtype"]
    near, num_rows = min(length, 8192), min(num_rows, length)
    prior = RecencyPrior(heads).to(device)
    queries, keys = torch.arange(length - num_rows, length, device=device), torch.arange(length, device=device)
    with torch.no_grad():
        future = keys[-near:] > queries[:, None]
        exact = prior.dense(queries, keys[-near:], dtype=torch.float64).masked_fill(future, float("-inf")).softmax(-1)
        split, single = (prior.lanes(queries, keys, dtype=kind) for kind in (dtype, torch.float32))
        found = []
        for name, lanes in (("digit lanes", (split.query, split.key)), ("one lane", (single.query, single.key))):
            query, key = (functional.pad(side.to(dtype), (64 - side.shape[-1], 0)) for side in lanes)
            key = key.expand(heads, -1, -1)
            scores = torch.cat([_scores(query, part) for part in key[:, -near:].split(256, dim=1)], dim=-1)
            scores = scores.masked_fill(future, float("-inf"))
            if near < length:
                earlier = log_sum_exp.attend(query[None], key[None, :, : length - near], scale=1.0)[1][0]
                scores = torch.cat([scores, earlier.double().unsqueeze(-1)], dim=-1)
            weights = scores.softmax(-1)
            variation = 0.5 * ((weights[..., :near] - exact).abs().sum(-1) + weights[..., near:].sum(-1))
            row = {"quantity": "total variation", "length": length, "name": name, "value": float(variation.max())}
            found.append({**row, "mean": float(variation.mean())})
    return found


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """<query, key> of every pair as a fused kernel computes it: (H, Q, K) float64 from (H, Q, D) and (H, K, D)."""
    alone = key.transpose(0, 1).unsqueeze(-2)
    return log_sum_exp.attend(query.expand(key.shape[1], *query.shape), alone, scale=1.0)[1].movedim(0, -1).double()


def _output_errors(config: Configuration, length: int, heads: int = 12, width: int = 64) -> list[Row]:
    with torch.no_grad():
        query, key, value = (_content(replace(config, seed=config.seed + n), 1, heads, length, width) for n in range(3))
        rows = torch.linspace(0, length - 1, min(64, length), device=query.device).long()
        prior = _trained(goat_prior(heads, num_frequencies=4), config)
        scale = 1 / math.sqrt(width)
        found = []
        plain = relative_error(_plain(query, key, value)[0, :, rows], causal_rows(query, key, value, rows, None, scale))
        output = _output(prior_attention(query, key, value, prior=prior, is_causal=True, backend="sdpa"))
        ours = relative_error(output[0, :, rows], causal_rows(query, key, value, rows, prior, scale))
        theirs = relative_error(
            peers.flashbias(query, key, value, prior)[0, :, rows], causal_rows(query, key, value, rows, prior, scale)
        )
        for name, error in (("SDPA, no prior", plain), ("eotattn, GOAT", ours), ("FlashBias as SDPA, GOAT", theirs)):
            row = {"quantity": "output error", "length": length, "name": name, "value": error}
            found.append({**row, "ratio": error / plain})
        return found


def gradients(config: Configuration) -> list[Row]:
    """Slope gradients against float64: the norm of the error over that of the signal, over heads.

    ``of_strengths`` is the same for the parameter, in which a head counts by its ALiBi slope; ``worst_head`` is the
    largest error of a head over the root mean square of all heads' signals.
    """
    rows: list[Row] = []
    heads, width = 12, 64
    for length in config.pick([128], [2048, 8192, 32768]):
        query, key, value, upstream = (
            _content(replace(config, seed=config.seed + n), 1, heads, length, width) for n in range(4)
        )
        for slope in ("ALiBi", "0.5"):
            prior = RecencyPrior(heads).to(query.device)
            if slope != "ALiBi":
                with torch.no_grad():
                    prior.strength.copy_(0.5 / prior.unit_slopes)
            output = _output(prior_attention(query, key, value, prior=prior, is_causal=True, backend="sdpa"))
            (found,) = torch.autograd.grad(output, [prior.strength], upstream.detach())
            slopes = prior.slopes.detach()
            q, k, v, up = (tensor.detach() for tensor in (query, key, value, upstream))
            exact = slope_gradient(q, k, v, up, slopes, 1 / math.sqrt(width))
            found = found.double() / prior.unit_slopes  # of the slope, not of the strength: every head counts alike
            error = (found - exact).abs() / exact.square().mean().sqrt()
            row: Row = {"quantity": "slope gradient", "length": length, "name": f"slopes {slope}"}
            row["value"], row["worst_head"] = relative_error(found, exact), float(error.max())
            row["of_strengths"] = relative_error(found * prior.unit_slopes, exact * prior.unit_slopes)
            rows.append(row)
    return rows


#: Every suite by name.
SUITES: dict[str, Callable[[Configuration], list[Row]]] = {
    "attention": attention,
    "layer": layer,
    "decode": decode,
    "padding": padding,
    "precision": precision,
    "gradients": gradients,
}
