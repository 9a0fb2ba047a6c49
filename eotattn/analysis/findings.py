"""What an analysis found, in three sentences.

Legend: A layers, H heads.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from eotattn.analysis.summary import Analysis

__all__ = ["findings"]

#: Mean sink mass above which a head counts as having a sink; that of the sink rate.
SINK = 0.3


def findings(analysis: Analysis) -> tuple[str, str, str]:
    """Say where attention goes without need, what that does to the output, and how much of it positions explain.

    Returns:
        Three sentences with the numbers of this analysis.

    Example:
        >>> import torch
        >>> from eotattn.analysis import analyze
        >>> findings(analyze(attention=torch.full((1, 2, 4, 4), 0.25)))[0]
        'None of 2 heads puts more than 30% of attention on key 0; the most is 25%, layer 0 head 0.'
    """
    return _sinks(analysis), _kinds(analysis), _explained(analysis)


def _sinks(analysis: Analysis) -> str:
    heads = analysis.heads
    name = next(name for name in heads.mean if name.startswith("sink mass of key"))
    key, mass = name.removeprefix("sink mass of "), heads.mean[name]
    known = ~np.isnan(mass)
    if not known.any():
        return f"No head admits {key}, so none was asked whether it is a sink."
    a, h = np.unravel_index(np.nanargmax(mass), mass.shape)
    count, total = int((mass[known] > SINK).sum()), int(known.sum())
    if analysis.tokens and key == "key 0":
        key = f"key 0 ({analysis.tokens[0]!r} in the first text)"
    who = (
        f"{count or 'None'} of {_heads(total)} put{'s' if count < 2 else ''} more than {SINK:.0%} of attention on {key}"
    )
    return f"{who}; the most is {mass[a, h]:.0%}, layer {heads.numbers[a]} head {heads.heads[h]}."


def _heads(count: int) -> str:
    return f"{count} head{'' if count == 1 else 's'}"


#: Kind of sink -> what it is called in a sentence.
_KINDS = {
    "no-operation": "a sink that writes next to nothing",
    "broadcast": "a sink that writes the same to every token",
    "other": "a sink of another kind",
    "none": "no dominant sink",
}


def _kinds(analysis: Analysis) -> str:
    counts = Counter(word for row in analysis.sink_kinds() for word in row)
    seen = counts.total() - counts[""]
    if not seen:
        return "What the sinks do to the output is not known, because values were not seen."
    parts = [f"{what} in {counts[kind]}" for kind, what in _KINDS.items() if counts[kind]]
    return f"By what values do, {_heads(seen)} have {', '.join(parts)}."


def _explained(analysis: Analysis) -> str:
    values = analysis.explained()
    values = values[np.isfinite(values)]
    if not values.size:
        return "How much of attention positions explain was not fitted, because no layer allows it."
    low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    in_sample = all(np.isnan(report.explained).all() for report in analysis.priors.values())
    how = "in the text that it was fitted to" if in_sample else "in texts that it was not fitted to"
    return (
        f"A prior that knows positions alone explains {median:.0%} of the attention of the median head {how} "
        f"(quartiles {low:.0%} to {high:.0%}; 0% is uniform attention)."
    )
