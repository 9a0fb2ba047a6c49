"""The folder of an analysis: tidy tables, figures, one self-contained page."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eotattn.checks import require
from eotattn.plotting import plot_key_only
from eotattn.plotting.files import to_png
from eotattn.plotting.heads import plot_head_grid, plot_lag_profile, plot_layer_curves, plot_margin_split
from eotattn.records import library_versions, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from eotattn.experiments.analysis import Analysis

__all__ = ["check_folder", "write_analysis"]

#: Names that an analysis writes; a folder that holds anything else is somebody else's.
REPORT, PAGE = "report.json", "report.html"
#: Tokens of the first text that the page shows.
SHOWN_TOKENS = 64

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
figure { display: inline-block; margin: 0 1em 1em 0; } img { max-width: 32em; width: 100%; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 6px; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.tokens td { min-width: 1.2em; height: 1.2em; border: 1px solid #fff; }
.tokens th { writing-mode: vertical-rl; font-weight: normal; text-align: left; } .wide { overflow-x: auto; }
"""


def check_folder(owner: str, folder: Path) -> Path:
    """Raise, before any work, unless ``folder`` is new, empty, or that of an earlier analysis."""
    if folder.exists():
        require(folder.is_dir(), owner, "out", "be a folder", folder.name, "Choose another name")
        ours = (folder / REPORT).is_file() or not any(folder.iterdir())
        require(ours, owner, "out", "be empty or hold an earlier report", folder.name, "Choose another folder")
    return folder


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Write tables, figures and the page; every file whole or not at all, ``report.json`` last."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: to_png(axes) for name, axes in _figures(analysis)}
    tables = {"heads": analysis.heads.to_dict(), "layers": _layer_table(analysis), "priors": _prior_table(analysis)}
    for name, content in figures.items():
        write_atomically(folder / f"{name}.png", content)
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", _as_csv(table))
    write_atomically(folder / PAGE, _page(analysis, figures).encode())
    record = {
        "layers": list(analysis.heads.layers),
        "num_texts": analysis.num_texts,
        "num_sequences": analysis.heads.num_sequences,
        "quantities": [
            {"name": q.name, "unit": q.unit, "formula": q.formula, "source": q.source}
            for q in analysis.heads.quantities
        ],
        "sink_rate": {str(t): _plain(rate) for t, rate in analysis.heads.sink_rate.items()},
        "mean": {name: _plain(values) for name, values in analysis.heads.mean.items()},
        "explained": _plain(analysis.explained()),
        "files": sorted([PAGE, *(f"{name}.png" for name in figures), *(f"{name}.csv" for name in tables)]),
        "versions": library_versions(),
    }
    write_atomically(folder / REPORT, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def _figures(analysis: Analysis) -> Iterator[tuple[str, Axes]]:
    """Name and Axes of one figure after the other."""
    heads, mean = analysis.heads, analysis.heads.mean
    sink, entropy = heads.quantities[0].name, "normalised entropy"
    yield "sink_mass", plot_head_grid(mean[sink], label=sink, low=0, high=1)
    yield "entropy", plot_head_grid(mean[entropy], label=entropy, low=0, high=1)
    if np.isfinite(analysis.explained()).any():  # a head that is uniform leaves nothing to explain
        yield "explained", plot_head_grid(analysis.explained(), label="KL explained by position", low=0, high=1)
    curves = {entropy: _by_layer(mean[entropy]), "sink rate": next(iter(heads.sink_rate.values()))}
    curves["context sensitivity"] = _by_layer(mean["context sensitivity"])
    yield "layers", plot_layer_curves(curves, ylabel="mean over heads")
    if np.isfinite(mean["content margin"]).any():
        yield "margins", plot_margin_split(mean["content margin"], mean["prior margin"])
    if analysis.residual_norms.get("first token"):
        axes = plot_layer_curves(analysis.residual_norms, ylabel="norm of the residual stream")
        axes.set_yscale("log")
        yield "residual_norms", axes
    for a, layer in enumerate(heads.layers):
        axes = plot_lag_profile(heads.lag_profile[a])
        axes.set_title(layer, fontsize=9)
        yield f"lags_{a}", axes
        if layer in analysis.priors:
            axes = plot_key_only(np.nan_to_num(analysis.priors[layer].key))
            axes.set_title(f"{layer}: u(j) of the implicit prior", fontsize=9)
            yield f"key_only_{a}", axes


def _by_layer(values: np.ndarray) -> np.ndarray:
    """Mean over the heads that exist."""
    return np.array([row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else np.nan for row in values])


def _layer_table(analysis: Analysis) -> dict[str, Any]:
    table: dict[str, Any] = {"layer": list(analysis.heads.layers)}
    for name, values in analysis.heads.mean.items():
        table[name] = _by_layer(values)
    for threshold, rate in analysis.heads.sink_rate.items():
        table[f"sink rate above {threshold}"] = rate
    return table


def _prior_table(analysis: Analysis) -> dict[str, Any]:
    """One row an entry: layer, head, part (lag or key), index in tokens, nats."""
    rows: dict[str, list[Any]] = {name: [] for name in ("layer", "head", "part", "tokens", "nats")}
    for layer, report in analysis.priors.items():
        parts = (("lag", report.lags, report.lag), ("key", np.arange(report.key.shape[1]), report.key))
        for part, at, values in parts:
            for head, row in enumerate(values):
                for index in np.flatnonzero(np.isfinite(row)):
                    entry = (layer, head, part, int(at[index]), float(row[index]))
                    for column, value in zip(rows.values(), entry, strict=True):
                        column.append(value)
    return rows


def _as_csv(table: Mapping[str, Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values(), strict=True):
        writer.writerow([f"{value:.7g}" if isinstance(value, (float, np.floating)) else value for value in row])
    return text.getvalue().encode()


def _plain(values: np.ndarray) -> Any:
    """Lists that JSON can hold: null for NaN."""
    return [
        _plain(row) if isinstance(row, np.ndarray) else (float(row) if np.isfinite(row) else None) for row in values
    ]


def _page(analysis: Analysis, figures: dict[str, bytes]) -> str:
    """One page without links to anything: figures and tokens are inside."""
    images = "".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{html.escape(name.replace('_', ' '))}</figcaption></figure>"
        for name, content in figures.items()
    )
    rows = "".join(
        f"<tr><td>{html.escape(q.name)}</td><td>{html.escape(q.unit)}</td><td>{html.escape(q.formula)}</td>"
        f"<td>{html.escape(q.source)}</td></tr>"
        for q in analysis.heads.quantities
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Attention report</title>'
        f"<style>{STYLE}</style></head><body><h1>Attention report</h1>"
        f"<p>{analysis.num_texts} texts, {len(analysis.heads.layers)} layers. Intervals are in heads.csv.</p>"
        f"<pre>{html.escape(str(analysis.heads))}</pre><h2>Who receives attention</h2>{_token_table(analysis)}"
        f"<h2>Figures</h2>{images}<h2>Definitions</h2><table><tr><th>quantity</th><th>unit</th><th>formula</th>"
        f"<th>source</th></tr>{rows}</table></body></html>\n"
    )


def _token_table(analysis: Analysis) -> str:
    """Mean weight on every key by layer, over heads; hover for the number."""
    width = max(share.shape[1] for share in analysis.heads.column_share)
    labels = [*analysis.tokens[:SHOWN_TOKENS]] or [str(j) for j in range(min(width, SHOWN_TOKENS))]
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    lines = []
    for layer, share in zip(analysis.heads.layers, analysis.heads.column_share, strict=True):
        cells = []
        for j, label in enumerate(labels[: share.shape[1]]):
            value = float(share[:, j].mean())
            title = html.escape(f"{layer}, key {j} {label!r}: {value:.3f}", quote=True)
            cells.append(f'<td title="{title}" style="background:rgba(0,114,178,{min(1.0, value**0.5):.2f})"></td>')
        lines.append(f"<tr><td>{html.escape(layer)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="tokens"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
