"""What a padding mask costs a layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, measured
from eotattn.benchmarks.suites.layer import layer_makers, step
from eotattn.benchmarks.timing import Candidate, Row

__all__ = ["padding"]


def padding(config: Configuration) -> Iterator[Row]:
    """The same layers with and without a padding mask; the baseline is the same layer without."""
    for batch, length, width, heads in config.pick([(2, 64, 64, 2)], [(8, 2048, 768, 12), (2, 8192, 1024, 16)]):
        x = content(config, batch, length, width)
        mask = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
        mask[0, length - length // 4 :] = True
        makers = layer_makers(config, width, heads)
        size = {"batch": batch, "length": length, "width": width, "heads": heads, "pass": "forward+backward"}
        for name in ("bare", "eotattn, recency + sink, reserved", "goat-attention"):
            candidates = [
                Candidate(f"{name}{suffix}", partial(step, makers[name], x, given))
                for suffix, given in ((", unpadded", None), (", padded", mask))
            ]
            yield from ({**size, **row} for row in measured(candidates, config))
