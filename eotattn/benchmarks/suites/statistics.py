"""All statistics of an attention call against the bare call: time, memory above the inputs, errors.

Legend: B batch, H heads, L tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eotattn.attention.statistics import row_statistics
from eotattn.attention.statistics.attention_statistics import AttentionStatistics
from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.inputs import content, gpt_prior, measured, trained
from eotattn.benchmarks.timing import Candidate, Row
from eotattn.priors.lanes import Lanes

__all__ = ["statistics"]

#: Keys whose mass is asked for: the first tokens, where sinks are.
CHOSEN = (0, 1, 2, 3)
#: The longest call that blocks of rows are timed on.
LONGEST_BLOCKS = 8192
#: Fields with a number for every row, key or lag.
FIELDS = (
    "log_sum_exp",
    "entropy",
    "participation",
    "num_keys",
    "score_range",
    "expected_score",
    "key_mass",
    "margin",
    "column_mass",
    "column_count",
    "lag_mass",
)


def statistics(config: Configuration) -> Iterator[Row]:
    """Every statistic of one causal layer against one bare SDPA forward call; errors against float64."""
    heads, width = config.pick([(2, 16)], [(12, 64)])[0]
    for length in config.pick([64], [8192, 32768, 131072]):
        found = measured(list(_candidates(config, heads, length, width)), config)
        size = {"quantity": "time", "batch": 1, "heads": heads, "length": length, "width": width}
        yield from ({**size, **row} for row in found)
    for length in config.pick([64], [2048]):
        for name, with_prior in (("eotattn, no prior", False), ("eotattn, recency + sink", True)):
            yield from _errors(config, name, heads, length, width, with_prior=with_prior)


def _candidates(config: Configuration, heads: int, length: int, width: int) -> Iterator[Candidate]:
    query, key, value = _inputs(config, 3, heads, length, width)
    yield Candidate(
        "SDPA, forward",
        _given(partial(functional.scaled_dot_product_attention, query, key, value, is_causal=True)),
    )
    ours = partial(row_statistics, query, key, is_causal=True, keys=CHOSEN)
    yield Candidate("eotattn, no prior", _given(ours))
    lanes = _lanes(config, heads, length)
    yield Candidate("eotattn, recency + sink", _given(partial(ours, log_prior=lanes)))
    if length <= LONGEST_BLOCKS:
        yield Candidate("eotattn, no prior, blocks of rows", _given(partial(ours, backend="blocks")))


def _inputs(config: Configuration, count: int, heads: int, length: int, width: int) -> list[Tensor]:
    seeds = range(config.seed, config.seed + count)
    return [content(replace(config, seed=seed), 1, heads, length, width).detach() for seed in seeds]


def _given(run: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
    return lambda: run


def _lanes(config: Configuration, heads: int, length: int) -> Lanes:
    positions = torch.arange(length, device=config.device)
    with torch.no_grad():
        return trained(gpt_prior(heads), config).lanes(positions, positions, dtype=config.place["dtype"])


def _errors(
    config: Configuration, name: str, heads: int, length: int, width: int, *, with_prior: bool
) -> Iterator[Row]:
    """The largest error of each field, relative to its largest entry where that exceeds one.

    The truth are blocks of rows in float64, from the same numbers; the tests compare those with dense formulas.
    """
    query, key = _inputs(config, 2, heads, length, width)
    lanes = _lanes(config, heads, length) if with_prior else None
    exact = None if lanes is None else replace(lanes, query=lanes.query.double(), key=lanes.key.double())
    found = row_statistics(query, key, log_prior=lanes, is_causal=True, keys=CHOSEN)
    truth = row_statistics(query.double(), key.double(), log_prior=exact, is_causal=True, keys=CHOSEN, backend="blocks")
    for field in FIELDS:
        value = _relative_error(found, truth, field)
        yield {"quantity": f"error of {field}", "length": length, "name": name, "value": value}


def _relative_error(found: AttentionStatistics, truth: AttentionStatistics, field: str) -> float:
    ours, theirs = (torch.nan_to_num(_entries(one, field)) for one in (found, truth))
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def _entries(statistics: AttentionStatistics, field: str) -> Tensor:
    entries: Tensor = getattr(statistics, field)
    return entries.double()
