"""What an analysis found, in sentences: each computed, with its uncertainty, and only as far as the texts carry it.

Legend: A layers, H heads, N texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eotattn.analysis.head_kinds import KINDS, MOSTLY, POSITION_ALONE, kind_grid, tellable
from eotattn.analysis.summary import Summary
from eotattn.diagnostics.strongest_keys import uniform_share

__all__ = ["details", "findings"]

Grid = NDArray[np.bool_]


def findings(analysis: Summary) -> tuple[str, str, str]:
    """Say which tokens attention rests on, which heads read tokens, and how much of attention is position.

    Returns:
        Three sentences with the numbers of this analysis.

    Example:
        >>> import torch
        >>> from eotattn.analysis import analyze
        >>> findings(analyze(attention=torch.full((1, 2, 4, 4), 0.25)))[0]
        'None of 2 heads puts more than 30% of attention on one token; the most is 25%, layer 0 head 0 (one text).'
    """
    return _sinks(analysis), _roles(analysis), _positions(analysis)


def details(analysis: Summary) -> tuple[str, ...]:
    """What more can be said: what sinks do to the residual stream and to the output."""
    return tuple(sentence for sentence in (_norms(analysis), _values(analysis)) if sentence)


def _sinks(analysis: Summary) -> str:
    heads, total = analysis.heads, _total(analysis)
    told = tellable(analysis)
    if not told.any():
        share = max(float(uniform_share(stats).max()) for stats in analysis.statistics.values())
        return (
            f"These texts are too short to tell a sink: uniform attention would put up to {share:.0%} on their first "
            f"token."
        )
    first, other = (kind_grid(analysis, kind) for kind in list(KINDS)[:2])
    name = "mass of the strongest key"
    if not (first | other).any():
        mass = heads.mean[name]
        return f"None of {_heads(total)} puts more than {MOSTLY:.0%} of attention on one token; the most is " + (
            f"{_top(analysis, mass, name)}."
        )
    text = f"{_of(first | other, total)} more than {MOSTLY:.0%} of attention on one token"
    if not np.isnan(heads.low[name]).all():
        sure = int(((first | other) & (heads.low[name] > MOSTLY)).sum())
        text += f" in most texts ({sure} with the whole 95% interval over {_texts(analysis)} above that)"
    else:
        text += " (one text, so without intervals)"
    parts = []
    if first.any():
        token = f" ({analysis.tokens[0][0]!r} in the first text)" if analysis.tokens else ""
        parts.append(f"the first token{token} in {int(first.sum())}, {_where(analysis, first)}")
    if other.any():
        parts.append(f"another one in {int(other.sum())}, {_where(analysis, other)}{_named(analysis, other)}")
    return f"{text}: {'; '.join(parts)}."


def _named(analysis: Summary, other: Grid) -> str:
    """The token that most of these heads rest on."""
    if not analysis.tokens:
        return ""
    found: Counter[tuple[str, int]] = Counter()
    for a, h in zip(*np.nonzero(other), strict=True):
        keys = zip(analysis.strongest.token[a][:, h], analysis.strongest.mass[a][:, h], strict=True)
        found.update((token, a) for token, mass in keys if mass > MOSTLY)
    (token, a), count = found.most_common(1)[0]
    of = int(other[a].sum()) * len(analysis.strongest.mass[a])
    return f", first of all {str(token)!r} in layer {analysis.heads.numbers[a]} ({count} of {of} heads and texts)"


#: Kind -> what such heads do, after a number of heads.
_ROLES = {
    "previous token": ("attends mostly to the previous token", "attend mostly to the previous token"),
    "induction": ("continues repeats (induction)", "continue repeats (induction)"),
    "duplicate token": ("looks up earlier copies of the token", "look up earlier copies of the token"),
}


def _roles(analysis: Summary) -> str:
    total, parts, mean = _total(analysis), [], analysis.heads.mean
    for kind, words in _ROLES.items():
        name, grid = KINDS[kind], kind_grid(analysis, kind)
        if name not in mean or np.isnan(mean[name]).all():
            continue
        count = int(grid.sum())
        best = f", most of all {_top(analysis, mean[name], name)}"
        parts.append(f"{count or 'none'} {words[count > 1]}{best if count else ''}")
    return f"Of {_heads(total)}, {'; '.join(parts)}." if parts else "What heads read was not seen."


def _positions(analysis: Summary) -> str:
    values = analysis.explained()
    values = values[np.isfinite(values)]
    if not values.size:
        return "How much of attention positions explain was not fitted, because no layer allows it."
    report = next(iter(analysis.priors.values()))
    numbers = int(np.isfinite(report.lag[0]).sum() + np.isfinite(report.key[0]).sum()) - 3
    rows = int(max(stats.num_queries.sum() for stats in analysis.statistics.values()))
    basis = f"{rows} rows for {numbers} numbers a head"
    if analysis.is_in_sample:
        return (
            f"Fitted to this one text and judged on it, in sample, a prior of position alone explains "
            f"{_spread(values)} of the attention of a head; other texts may show less ({basis})."
        )
    fails, alone, total = analysis.fails(), kind_grid(analysis, "position alone"), _heads(_total(analysis))
    start, basis = "On texts it was not fitted to, a prior of position alone", f"({basis}, {_texts(analysis)})"
    held = analysis.explained()[~fails & np.isfinite(analysis.explained())]
    if not held.size:
        return f"{start} is not surely better than uniform in any of {total}, so none is shown {basis}."
    text = f"{start} explains more than {POSITION_ALONE:.0%} of the attention of {int(alone.sum())} of {total}"
    if fails.any():
        text += f"; in {int(fails.sum())} it is not surely better than uniform, and is not shown"
    return f"{text}; in the {'others' if fails.any() else 'heads'} it explains {_spread(held)} {basis}."


def _spread(shares: NDArray[np.float64]) -> str:
    low, median, high = (float(q) for q in np.quantile(shares, (0.25, 0.5, 0.75)))
    return f"{median:.0%} in the median (quartiles {low:.0%} to {high:.0%})"


def _norms(analysis: Summary) -> str:
    """The largest jump of the first token's norm from one block to the next."""
    found = analysis.residuals
    if len(found.blocks) < 2:
        return ""
    first = np.array([np.mean(found.first_token[block]) for block in found.blocks])
    other = np.array([np.mean(found.other_tokens[block]) for block in found.blocks])
    at = int(np.argmax(first[1:] / first[:-1])) + 1
    ratios = np.array(found.first_token[found.blocks[at]]) / np.array(found.other_tokens[found.blocks[at]])
    spread = "" if len(ratios) < 2 else f" ({ratios.min():.3g} to {ratios.max():.3g} over the texts)"
    return (
        f"The norm of the first token grows most in block {at}, from {_size(first[at - 1])} to {_size(first[at])}; "
        f"it is then {first[at] / other[at]:.3g} times the mean norm of the other tokens{spread}."
    )


def _size(norm: float) -> str:
    return f"{norm:,.0f}" if norm >= 100 else f"{norm:.3g}"


#: Kind of sink -> what it is called in a sentence.
_SINKS = {
    "no-operation": "write next to nothing",
    "broadcast": "write the same to every token",
    "other": "do neither",
}


def _values(analysis: Summary) -> str:
    counts = Counter(word for row in analysis.sink_kinds() for word in row)
    seen = counts.total() - counts[""]
    if not seen:
        return ""
    parts = [f"{counts[kind]} {what}" for kind, what in _SINKS.items() if counts[kind]]
    sinks = seen - counts["none"]
    how = f": {', '.join(parts)}" if parts else ""
    return f"By its values, the first token is a dominant sink in {sinks} of {_heads(seen)}{how}."


def _total(analysis: Summary) -> int:
    return int((~np.isnan(analysis.heads.mean["entropy"])).sum())


def _heads(count: int) -> str:
    return f"{count} head{'' if count == 1 else 's'}"


def _texts(analysis: Summary) -> str:
    count = analysis.heads.num_sequences
    return f"{count} text{'' if count == 1 else 's'}"


def _of(grid: Grid, total: int) -> str:
    count = int(grid.sum())
    return f"{count} of {_heads(total)} put{'s' if count == 1 else ''}"


def _top(analysis: Summary, values: NDArray[np.float64], name: str) -> str:
    """The head that has most of a quantity, and its interval."""
    heads = analysis.heads
    a, h = np.unravel_index(np.nanargmax(values), values.shape)
    low, high = heads.low[name][a, h], heads.high[name][a, h]
    spread = "one text" if np.isnan(low) else f"95% interval {low:.0%} to {high:.0%}"
    return f"{values[a, h]:.0%}, layer {heads.numbers[a]} head {heads.heads[h]} ({spread})"


def _where(analysis: Summary, grid: Grid) -> str:
    """Layers that have such heads; those where most are, if there are any."""
    exists = ~np.isnan(analysis.heads.mean["entropy"])
    most = grid.sum(1) > exists.sum(1) / 2
    chosen = np.flatnonzero(most if most.any() else grid.any(1))
    numbers = [analysis.heads.numbers[a] for a in chosen]
    return f"{'most heads of ' if most.any() else 'in '}layer{'s' * (len(numbers) > 1)} {_ranges(numbers)}"


def _ranges(numbers: Iterable[int]) -> str:
    """Runs of whole numbers.

    Example:
        >>> _ranges([3, 4, 5, 9])
        '3 to 5, 9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
