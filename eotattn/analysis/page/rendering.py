"""One self-contained page: the numbers of an analysis as JSON, and a script that draws them; nothing from outside."""

from __future__ import annotations

import html
import json
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from eotattn.analysis.findings import findings
from eotattn.analysis.summary import Analysis
from eotattn.analysis.tables import Curve, layer_curves, plain, residual_curves

__all__ = ["page"]

#: Tokens of the first text, and positions of a prior, that the page shows.
SHOWN_TOKENS, SHOWN_POSITIONS = 64, 32
#: Significant digits of the numbers inside.
DIGITS = 6

#: The browser itself refuses whatever would leave the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(analysis: Analysis) -> str:
    """The page as HTML."""
    return Template(_part("report.html")).substitute(
        policy=POLICY,
        style=_part("report.css"),
        script=_part("report.js"),
        data=json.dumps(_rounded(_payload(analysis)), allow_nan=False).replace("<", "\\u003c"),
        summary=html.escape(_summary(analysis)),
        findings="".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(analysis)),
        shown=html.escape(_shown(analysis)),
        missing=_missing(analysis),
        definitions=_definitions(analysis),
    )


def _part(name: str) -> str:
    """A file of the page, which lies beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _missing(analysis: Analysis) -> str:
    entries = "".join(f"<li><b>{html.escape(n)}</b> {html.escape(why)}</li>" for n, why in analysis.needs.items())
    return f"<h2>What is missing, and what it needs</h2><ul>{entries}</ul>" if entries else ""


def _shown(analysis: Analysis) -> str:
    """How much of the first text the picture of tokens has."""
    count = len(analysis.tokens)
    return f"The first {SHOWN_TOKENS} of {count} tokens." if count > SHOWN_TOKENS else ""


def _summary(analysis: Analysis) -> str:
    heads = analysis.heads
    count = sum(int((~np.isnan(row)).sum()) for row in heads.mean["entropy"])
    done = (
        f"{analysis.num_texts} of {analysis.num_given} texts"
        if not analysis.is_complete
        else (f"{analysis.num_texts} text{'s' if analysis.num_texts != 1 else ''}")
    )
    lines = [f"{done}, {len(heads.layers)} layers, {count} heads."]
    if not analysis.is_complete:
        lines.append("The run was interrupted; this is what was finished.")
    if analysis.num_cut:
        lines.append(f"{analysis.num_cut} of the texts were cut to the length asked for.")
    massive = [block for block, share in analysis.residuals.massive_share().items() if share > 0]
    if massive:
        lines.append(f"Massive activations after {', '.join(massive)}.")
    return " ".join(lines)


def _definitions(analysis: Analysis) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(q.name)}</td><td>{html.escape(q.unit)}</td><td>{html.escape(q.formula)}</td>"
        f"<td>{html.escape(q.source)}</td></tr>"
        for q in analysis.heads.quantities
    )
    return f"<table><tr><th>quantity</th><th>unit</th><th>formula</th><th>source</th></tr>{rows}</table>"


def _payload(analysis: Analysis) -> dict[str, Any]:
    heads, explained = analysis.heads, analysis.explained()
    quantities = [{"name": q.name, "unit": q.unit, "formula": q.formula} for q in heads.quantities]
    grids = {
        part: {name: plain(grid) for name, grid in getattr(heads, part).items()} for part in ("mean", "low", "high")
    }
    if np.isfinite(explained).any():
        formula = "1 - E KL(p || prior) / E KL(p || uniform), held out where there are two texts or more"
        quantities.append({"name": "explained by position", "unit": "1", "formula": formula})
        grids["mean"]["explained by position"] = plain(explained)
        for side, index in (("low", 0), ("high", 1)):
            grids[side]["explained by position"] = plain(_intervals(analysis)[..., index])
    return {
        "layers": list(heads.layers),
        "numbers": list(heads.numbers),
        "heads": list(heads.heads),
        "tokens": list(analysis.tokens[:SHOWN_TOKENS]),
        "quantities": quantities,
        **grids,
        "kinds": analysis.sink_kinds(),
        "shares": [_first_shares(analysis, layer) for layer in heads.layers],
        "priors": [_prior(analysis, layer) for layer in heads.layers],
        "curves": _curves(analysis),
    }


def _intervals(analysis: Analysis) -> np.ndarray:
    """(A, H, 2) of the explained divergence."""
    grid = np.full((*analysis.heads.mean["entropy"].shape, 2), np.nan)
    for a, layer in enumerate(analysis.heads.layers):
        if layer in analysis.priors:
            interval = analysis.priors[layer].interval
            grid[a, : len(interval)] = interval
    return grid


def _first_shares(analysis: Analysis, layer: str) -> Any:
    """Heads by tokens: mean weight on each key of the first text over the queries that admit it."""
    stats = analysis.statistics[layer]
    mass, count = stats.column_mass[0, :, :SHOWN_TOKENS], stats.column_count[0, :, :SHOWN_TOKENS]
    seen = (count > 0).any(0)
    return plain((mass / count.clamp(min=1))[:, seen].numpy())


def _prior(analysis: Analysis, layer: str) -> dict[str, Any] | None:
    """Both parts on the first positions."""
    if layer not in analysis.priors:
        return None
    report = analysis.priors[layer]
    size, reach = min(SHOWN_POSITIONS, report.key.shape[1]), report.key.shape[1] - 1
    lag = report.lag[:, reach - size + 1 : reach + size]
    return {"causal": report.is_causal, "size": size, "lag": plain(lag), "key": plain(report.key[:, :size])}


def _curves(analysis: Analysis) -> list[dict[str, Any]]:
    """Panels of curves over layers and blocks: title, and name -> values with an interval where there is one."""
    heads, blocks = analysis.heads, analysis.residuals.blocks
    panel = {"title": "mean over heads", "names": list(heads.layers), "log": False, "numbers": list(heads.numbers)}
    panels = [panel | {"curves": _plain_curves(layer_curves(analysis))}]
    if blocks:
        title = "norm of the residual stream after each block"
        panel = {"title": title, "names": blocks, "log": True, "numbers": list(range(len(blocks)))}
        panels.append(panel | {"curves": _plain_curves(residual_curves(analysis))})
    return panels


def _plain_curves(curves: dict[str, Curve]) -> dict[str, dict[str, Any]]:
    parts = ("mean", "low", "high")
    return {name: {part: plain(row) for part, row in zip(parts, curve, strict=True)} for name, curve in curves.items()}


def _rounded(value: Any) -> Any:
    """Floats with few digits, everything else as it is."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
