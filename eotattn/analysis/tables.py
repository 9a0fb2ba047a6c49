"""The tables of an analysis, one row a measurement."""

from __future__ import annotations

from typing import Any

import numpy as np

from eotattn.analysis.summary import Analysis

__all__ = ["layer_means", "mean_interval", "plain", "tables"]

Row = dict[str, Any]


def tables(analysis: Analysis) -> dict[str, list[Row]]:
    """Name -> rows; a table without rows is not there."""
    return {
        "heads": _head_rows(analysis),
        "layers": _layer_rows(analysis),
        "priors": _prior_rows(analysis),
        "residuals": _residual_rows(analysis),
    }


def layer_means(values: np.ndarray) -> np.ndarray:
    """Mean over the heads that exist, (A, H) -> (A,)."""
    return np.array([row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else np.nan for row in values])


def mean_interval(values: list[float], *, num_bootstraps: int = 500, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval; the interval is NaN below two values."""
    numbers = np.array(values)
    if len(numbers) < 2:
        return float(numbers.mean()), float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(num_bootstraps, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(1), [0.025, 0.975])
    return float(numbers.mean()), float(low), float(high)


def plain(values: np.ndarray) -> Any:
    """Lists that JSON can hold: null for what is not finite."""
    return [plain(row) if isinstance(row, np.ndarray) else (float(row) if np.isfinite(row) else None) for row in values]


def _head_rows(analysis: Analysis) -> list[Row]:
    columns = analysis.heads.to_dict()
    rows: list[Row] = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    explained, kinds = analysis.explained(), analysis.sink_kinds()
    layers, numbers = (list(names) for names in (analysis.heads.layers, analysis.heads.heads))
    for row in rows:
        a, head = layers.index(str(row["layer"])), numbers.index(int(row["head"]))
        row["explained by position"], row["sink kind"] = float(explained[a, head]), kinds[a][head]
    return rows


def _layer_rows(analysis: Analysis) -> list[Row]:
    """One row a layer: means over heads, with intervals."""
    heads = analysis.heads
    found = {name: (layer_means(values), heads.layer_interval[name]) for name, values in heads.mean.items()}
    for threshold, rate in heads.sink_rate.items():
        found[f"sink rate above {threshold}"] = rate, heads.sink_rate_interval[threshold]
    rows: list[Row] = [{"layer": layer} for layer in heads.layers]
    for a, row in enumerate(rows):
        for name, (means, interval) in found.items():
            row[name], row[f"{name} low"], row[f"{name} high"] = map(float, (means[a], *interval[a]))
    return rows


def _prior_rows(analysis: Analysis) -> list[Row]:
    """One row an entry: layer, head, part (lag or key), index in tokens, nats."""
    rows: list[Row] = []
    for layer, report in analysis.priors.items():
        parts = (("lag", report.lags, report.lag), ("key", np.arange(report.key.shape[1]), report.key))
        for part, at, values in parts:
            for number, row in zip(analysis.heads.heads, values, strict=False):
                rows += [
                    {"layer": layer, "head": number, "part": part, "tokens": int(at[index]), "nats": float(row[index])}
                    for index in np.flatnonzero(np.isfinite(row))
                ]
    return rows


def _residual_rows(analysis: Analysis) -> list[Row]:
    """One row a block: norms with intervals, the spike, where it is, and how often it is massive."""
    found, rows = analysis.residuals, []
    massive = found.massive_share()
    for block in found.blocks:
        row: Row = {"block": block}
        for kind in ("first_token", "other_tokens", "largest", "median"):
            name = kind.replace("_", " ")
            row[name], row[f"{name} low"], row[f"{name} high"] = mean_interval(getattr(found, kind)[block])
        positions = np.array(found.largest_at[block])
        row["largest at token 0"] = float((positions == 0).mean())
        row["massive activations"] = massive[block]
        rows.append(row)
    return rows
