"""A whole layer, forward and backward, against the layers that others would use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eotattn.attention import PriorAttention
from eotattn.benchmarks import peers
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, gpt_prior, measured
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.priors import LogPrior, goat_prior

__all__ = ["COMPILED", "CausalLayer", "compiled", "layer", "layer_makers", "step"]

#: Modes of ``torch.compile`` by how the table calls them; the second replays CUDA graphs, where no host counts.
COMPILED = {"compiled": "default", "compiled into graphs": "reduce-overhead"}


def layer(config: Configuration) -> Iterator[Row]:
    """A whole layer, forward and backward, against the bare layer; eager and, on a GPU, compiled."""
    small, full = [(1, 128, 64, 2), (2, 512, 256, 4)], [(8, 2048, 768, 12), (2, 8192, 1024, 16)]
    for batch, length, width, heads in config.pick(small, full):
        torch.compiler.reset()  # or the second size would be compiled for any size
        x = content(config, batch, length, width)
        makers = layer_makers(config, width, heads)
        candidates = [Candidate(name, partial(step, make, x)) for name, make in makers.items()]
        if config.device != "cpu":
            for name in ("bare", "eotattn, recency + sink, reserved"):
                for suffix, mode in COMPILED.items():
                    make = partial(compiled, makers[name], mode)
                    candidates.append(Candidate(f"{name}, {suffix}", partial(step, make, x)))
        size = {"batch": batch, "length": length, "width": width, "heads": heads, "pass": "forward+backward"}
        yield from ({**size, **row} for row in measured(candidates, config))


def layer_makers(config: Configuration, width: int, heads: int) -> dict[str, Callable[[], Any]]:
    """Layers by name, each a function that builds it."""
    dtype, device = config.place["dtype"], config.place["device"]

    def ours(prior: LogPrior | None, **keywords: Any) -> Callable[[], Any]:
        if keywords.get("lanes") == "reserved":
            keywords["lane_dtype"] = dtype
        keywords = {"bias": False, "batch_first": True, **keywords}
        return lambda: CausalLayer(PriorAttention(width, heads, prior=prior, **keywords).to(**config.place))

    made: dict[str, Callable[[], Any]] = {
        "bare": lambda: peers.BareLayer(width, heads).to(**config.place),
        "eotattn, no prior": ours(None),
        "eotattn, recency + sink, reserved": ours(gpt_prior(heads), lanes="reserved"),
        "eotattn, GOAT, 4 frequencies, reserved": ours(goat_prior(heads, num_frequencies=4), lanes="reserved"),
        "eotattn, GOAT, 4 frequencies, appended": ours(goat_prior(heads, num_frequencies=4)),
        "RoPE, eager": lambda: peers.BareLayer(width, heads, rotary="eager").to(**config.place),
        "goat-attention": lambda: peers.GoatLayer(width, heads, dtype).to(device),
    }
    if config.device != "cpu":
        made["RoPE, fused"] = lambda: peers.BareLayer(width, heads, rotary="fused").to(**config.place)
    return made


class CausalLayer(torch.nn.Module):
    """A :class:`PriorAttention` that is causal and called like the other layers here."""

    def __init__(self, layer: PriorAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """Attend over (B, L, E); ``padding`` (B, L) is true where a key is padding."""
        return self.layer(x, key_padding_mask=padding, is_causal=True, need_weights=False)[0]


def compiled(make: Callable[[], Any], mode: str) -> Any:
    """The layer that ``make`` builds, compiled as one graph."""
    module = make()
    graph: Any = torch.compile(module, fullgraph=True, mode=mode)
    graph.parameters = module.parameters
    return graph


def step(make: Callable[[], Any], x: Tensor, mask: Tensor | None = None) -> Callable[[], Any]:
    """Forward and backward of a layer."""
    module = make()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    upstream = torch.randn_like(x)
    keywords = {} if mask is None else {"padding": mask}
    return lambda: torch.autograd.grad(module(x, **keywords), [x, *parameters], upstream, allow_unused=True)
