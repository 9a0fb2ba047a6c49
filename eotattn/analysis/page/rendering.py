"""One self-contained page: the numbers of an analysis, compressed, and a script that draws them; nothing from outside.

Legend: A layers, H heads, T texts shown, W tokens shown.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eotattn.analysis.findings import details, findings
from eotattn.analysis.head_kinds import KINDS, head_kinds
from eotattn.analysis.summary import Summary
from eotattn.analysis.tables import Curve, layer_curves, plain, residual_curves

__all__ = ["page", "payload"]

#: Positions of a prior, and tokens of the pictures of whole layers, that the page shows.
SHOWN_POSITIONS, SHOWN_TOKENS = 32, 64
#: Pairs of tokens that all pictures of single heads may have together: what keeps the page below 3 MB.
PAIRS = 500_000
#: Least weight of a pair, and keys a query, that are shown.
LEAST_WEIGHT, KEYS = 0.05, 4
#: Significant digits of the numbers inside.
DIGITS = 5

#: The browser itself refuses whatever would leave the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(analysis: Summary) -> str:
    """The page as HTML."""
    content = json.dumps(_rounded(payload(analysis)), allow_nan=False, separators=(",", ":"))
    return Template(_part("report.html")).substitute(
        policy=POLICY,
        style=_part("report.css"),
        script=_part("charts.js") + _part("report.js"),
        data=base64.b64encode(zlib.compress(content.encode(), 9)).decode(),
        subject=html.escape(str(analysis.subject)),
        summary=html.escape(_summary(analysis)),
        findings=_items(findings(analysis)),
        details=_items(details(analysis)),
        shown=html.escape(_shown(analysis)),
        missing=_missing(analysis),
        definitions=_definitions(analysis),
    )


def _part(name: str) -> str:
    """A file of the page, which lies beside this module."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _items(sentences: tuple[str, ...]) -> str:
    return "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)


def _missing(analysis: Summary) -> str:
    entries = "".join(f"<li><b>{html.escape(n)}</b> {html.escape(why)}</li>" for n, why in analysis.needs.items())
    return f"<h2>What is missing, and what it needs</h2><ul>{entries}</ul>" if entries else ""


def _window(analysis: Summary) -> tuple[int, int]:
    """Texts and tokens whose pairs are shown: few enough for all heads together."""
    if not analysis.top_keys:
        return 0, 0
    kept = [found.key.shape for found in analysis.top_keys.values()]
    texts, rows = max(shape[0] for shape in kept), max(shape[2] for shape in kept)
    heads = sum(shape[1] for shape in kept)
    total = max(32, PAIRS // (2 * heads))  # about two keys a query are above the least weight
    texts = min(texts, max(1, total // min(rows, 96)))
    return texts, min(rows, total // texts)


def _shown(analysis: Summary) -> str:
    """How much of the texts the pictures of tokens have."""
    texts, tokens = _window(analysis)
    given, longest = analysis.num_texts, max(map(len, analysis.tokens), default=tokens)
    rule = f"Of every query the up to {KEYS} keys with at least {LEAST_WEIGHT:.0%} of its weight."
    parts = [f"The first {tokens} of {longest} tokens."] if longest > tokens else []
    parts += [f"The first {texts} of {given} texts."] if given > texts else []
    return " ".join([rule, *parts])


def _summary(analysis: Summary) -> str:
    heads = analysis.heads
    count = sum(int((~np.isnan(row)).sum()) for row in heads.mean["entropy"])
    done = (
        f"{analysis.num_texts} of {analysis.num_given} texts"
        if not analysis.is_complete
        else (f"{analysis.num_texts} text{'s' if analysis.num_texts != 1 else ''}")
    )
    lengths = sorted({len(tokens) for tokens in analysis.tokens})
    if lengths:
        done += f" of {lengths[0]} tokens" if len(lengths) == 1 else f" of {lengths[0]} to {lengths[-1]} tokens"
    lines = [f"{done}, {len(heads.layers)} layers, {count} heads."]
    if not analysis.is_complete:
        lines.append("The run was interrupted; this is what was finished.")
    if analysis.num_cut:
        lines.append(f"{analysis.num_cut} of the texts were cut to the length asked for.")
    massive = [block for block, share in analysis.residuals.massive_share().items() if share > 0]
    if massive:
        more = f" and {len(massive) - 1} later blocks" if len(massive) > 1 else ""
        lines.append(f"Massive activations after {massive[0]}{more}.")
    return " ".join(lines)


def _definitions(analysis: Summary) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(q.name)}</td><td>{html.escape(q.unit)}</td><td>{html.escape(q.formula)}</td>"
        f"<td>{html.escape(q.source)}</td></tr>"
        for q in analysis.heads.quantities
    )
    return f"<table><tr><th>quantity</th><th>unit</th><th>formula</th><th>source</th></tr>{rows}</table>"


def payload(analysis: Summary) -> dict[str, Any]:
    """All numbers of the page, as the script reads them."""
    heads, explained, fails = analysis.heads, analysis.explained(), analysis.fails()
    quantities = [{"name": q.name, "unit": q.unit, "formula": q.formula} for q in heads.quantities]
    grids = {
        part: {name: plain(grid) for name, grid in getattr(heads, part).items()} for part in ("mean", "low", "high")
    }
    if np.isfinite(explained).any():
        where = "in sample, on the one text it was fitted to" if analysis.is_in_sample else "held out"
        formula = f"1 - E KL(p || prior) / E KL(p || uniform), {where}; hatched: not surely above zero"
        quantities.append({"name": "explained by position", "unit": "1", "formula": formula})
        interval = np.where(fails[..., None], np.nan, analysis.explained_interval())
        grids["mean"]["explained by position"] = plain(np.where(fails, np.nan, explained))
        grids["low"]["explained by position"] = plain(interval[..., 0])
        grids["high"]["explained by position"] = plain(interval[..., 1])
    quantities.sort(key=lambda quantity: quantity["name"] != "mass of the strongest key")  # what is drawn at first
    texts, width = _window(analysis)
    return {
        "layers": list(heads.layers),
        "numbers": list(heads.numbers),
        "heads": list(heads.heads),
        "texts": [_names(analysis, text, width) for text in range(texts)],
        "named": [_beginning(tokens) for tokens in analysis.tokens],
        "quantities": quantities,
        **grids,
        "sinks": analysis.sink_kinds(),
        "kinds": KINDS,
        "kind": [[list(kinds) for kinds in row] for row in head_kinds(analysis)],
        "fails": fails.tolist(),
        "strongest": [_strongest(analysis, a) for a in range(len(heads.layers))],
        "pairs": [[_pairs(analysis, layer, text, width) for layer in heads.layers] for text in range(texts)],
        "shares": [_shares(analysis, layer, texts) for layer in heads.layers],
        "priors": [_prior(analysis, layer, fails[a]) for a, layer in enumerate(heads.layers)],
        "curves": _curves(analysis),
    }


def _names(analysis: Summary, text: int, width: int) -> list[str]:
    """Tokens of a text, or nothing where they are not known."""
    if not analysis.tokens:
        return [""] * width
    kept = max((found.key.shape[2] for found in analysis.top_keys.values()), default=0)
    return list(analysis.tokens[text][: max(width, kept)])


def _beginning(tokens: tuple[str, ...]) -> str:
    """The first words of a text, by which it is named."""
    words = "".join(token.removeprefix("##") for token in tokens[:12]).replace("⏎", " ").split()
    return " ".join(words)[:40]


def _strongest(analysis: Summary, a: int) -> list[list[list[Any]]]:
    """Heads by texts: position, mass in percent and token of the strongest key."""
    found = analysis.strongest
    percent = np.rint(100 * found.mass[a]).astype(int)
    columns = (found.position[a].T.tolist(), percent.T.tolist(), found.token[a].T.tolist())
    return [[list(entry) for entry in zip(*rows, strict=True)] for rows in zip(*columns, strict=True)]


def _pairs(analysis: Summary, layer: str, text: int, width: int) -> list[list[list[int]]] | None:
    """Heads: keys a query, keys, and weights in percent, one after the other."""
    kept = analysis.top_keys.get(layer)
    if kept is None or text >= kept.key.shape[0]:
        return None
    count = min(width, len(analysis.tokens[text])) if analysis.tokens else width
    key, weight = (values[text, :, :count, :KEYS].numpy() for values in (kept.key, kept.weight))
    return [_packed(*head) for head in zip(key, weight, strict=True)]


def _packed(key: NDArray[np.int32], weight: NDArray[np.float32]) -> list[list[int]]:
    seen = weight >= LEAST_WEIGHT
    return [seen.sum(-1).tolist(), key[seen].tolist(), np.rint(100 * weight[seen]).astype(int).tolist()]


def _shares(analysis: Summary, layer: str, texts: int) -> list[Any]:
    """Texts by tokens: mean weight on each key over heads, and over the queries that admit it."""
    stats, rows = analysis.statistics[layer], []
    for text in range(min(texts, stats.num_sequences)):
        mass, count = (part[text, :, :SHOWN_TOKENS] for part in (stats.column_mass, stats.column_count))
        seen = (count > 0).any(0)
        rows.append(plain((mass / count.clamp(min=1))[:, seen].mean(0).numpy()))
    return rows


def _prior(analysis: Summary, layer: str, fails: NDArray[np.bool_]) -> dict[str, Any] | None:
    """Both parts on the first positions; nothing of fits that failed."""
    if layer not in analysis.priors:
        return None
    report = analysis.priors[layer]
    size, reach = min(SHOWN_POSITIONS, report.key.shape[1]), report.key.shape[1] - 1
    lag, key = report.lag[:, reach - size + 1 : reach + size], report.key[:, :size]
    parts = zip(plain(lag), plain(key), fails, strict=False)
    shown = [None if failed else {"lag": of_lag, "key": of_key} for of_lag, of_key, failed in parts]
    return {"causal": report.is_causal, "size": size, "inSample": analysis.is_in_sample, "heads": shown}


def _curves(analysis: Summary) -> list[dict[str, Any]]:
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
