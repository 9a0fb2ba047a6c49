"""The tables of an analysis, one row a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from eotattn.analysis.head_kinds import head_kinds
from eotattn.analysis.summary import Summary
from eotattn.diagnostics.bootstrap import mean_interval, resamples

__all__ = ["Curve", "head_columns", "layer_curves", "plain", "residual_curves", "tables"]

Row = dict[str, Any]
#: Mean and both ends of its interval, one entry a layer or block.
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]

#: Quantities whose means over heads are drawn by layer, beside the rates of sinks.
LAYER_CURVES = ("normalised entropy", "context sensitivity")


def tables(analysis: Summary) -> dict[str, list[Row]]:
    """Name -> rows; a table without rows is not there."""
    return {
        "heads": _rows(head_columns(analysis)),
        "strongest": _strongest_rows(analysis),
        "layers": _layer_rows(analysis),
        "priors": _prior_rows(analysis),
        "residuals": _residual_rows(analysis),
    }


def layer_means(values: np.ndarray) -> np.ndarray:
    """Mean over the heads that exist, (A, H) -> (A,)."""
    return np.array([row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else np.nan for row in values])


def layer_curves(analysis: Summary) -> dict[str, Curve]:
    """What is drawn by layer: means over heads, and the rates of sinks."""
    heads = analysis.heads
    curves = {name: (layer_means(heads.mean[name]), *heads.layer_interval[name].T) for name in LAYER_CURVES}
    for threshold, rate in heads.sink_rate.items():
        curves[f"sink rate above {threshold}"] = (rate, *heads.sink_rate_interval[threshold].T)
    return curves


def residual_curves(analysis: Summary) -> dict[str, Curve]:
    """Norms of the residual stream by block: means over the texts."""
    found = analysis.residuals
    kinds = {"first token": found.first_token, "other tokens": found.other_tokens, "largest |x|": found.largest}
    return {name: _over_texts(by_block[block] for block in found.blocks) for name, by_block in kinds.items()}


def _over_texts(numbers: Iterable[list[float]], *, num_bootstraps: int = 500, seed: int = 0) -> Curve:
    """Mean over the texts that reached each block, and its interval."""
    rows = []
    for values in numbers:
        drawn = resamples(len(values), num_bootstraps, torch.Generator().manual_seed(seed))
        rows.append(np.concatenate(mean_interval(torch.tensor(values, dtype=torch.float64)[:, None], drawn)))
    mean, low, high = np.array(rows).T
    return mean, low, high


def plain(values: np.ndarray) -> Any:
    """Lists that JSON can hold: null for what is not finite."""
    return [plain(row) if isinstance(row, np.ndarray) else (float(row) if np.isfinite(row) else None) for row in values]


def head_columns(analysis: Summary) -> dict[str, np.ndarray]:
    """One row a layer and head: every quantity with its interval, what positions explain, kinds."""
    columns: dict[str, np.ndarray] = dict(analysis.heads.to_dict())
    a, h = np.nonzero(~np.isnan(analysis.heads.mean["entropy"]))  # in the order of the other columns
    kinds = head_kinds(analysis)
    columns["explained by position"], columns["prior fails"] = analysis.explained()[a, h], analysis.fails()[a, h]
    columns["sink kind"] = np.array(analysis.sink_kinds())[a, h]
    columns["kinds"] = np.array(["; ".join(kinds[i][j]) for i, j in zip(a, h, strict=True)])
    return columns


def _rows(columns: Mapping[str, np.ndarray]) -> list[Row]:
    """The same, a row each, as plain numbers and words."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*(v.tolist() for v in columns.values()), strict=True)]


def _strongest_rows(analysis: Summary) -> list[Row]:
    """One row a layer, text and head; heads by their numbers in the model."""
    columns = analysis.strongest.to_dict()
    return _rows(columns | {"head": np.array(analysis.heads.heads)[columns["head"].astype(np.int64)]})


def _layer_rows(analysis: Summary) -> list[Row]:
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


def _prior_rows(analysis: Summary) -> list[Row]:
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


def _residual_rows(analysis: Summary) -> list[Row]:
    """One row a block: norms with intervals, the spike, where it is, and how often it is massive."""
    found = analysis.residuals
    if not found.blocks:
        return []
    massive = found.massive_share()
    rows: list[Row] = [{"block": block} for block in found.blocks]
    for kind in ("first_token", "other_tokens", "largest", "median"):
        name, by_block = kind.replace("_", " "), getattr(found, kind)
        for row, *numbers in zip(rows, *_over_texts(by_block[block] for block in found.blocks), strict=True):
            row[name], row[f"{name} low"], row[f"{name} high"] = map(float, numbers)
    for row in rows:
        row["largest at token 0"] = float((np.array(found.largest_at[row["block"]]) == 0).mean())
        row["massive activations"] = massive[row["block"]]
    return rows
