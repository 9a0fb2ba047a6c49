"""An analysis: what was found, its tables, its page, and what other viewers read.

Legend: A layers, H heads, N texts, W tokens shown.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eotattn.analysis.findings import findings
from eotattn.analysis.page import page
from eotattn.analysis.shards import merged
from eotattn.analysis.summary import Subject, Summary, TextFindings
from eotattn.analysis.tables import head_columns
from eotattn.attention.statistics.running import SequenceStatistics
from eotattn.checks import check_indices, require
from eotattn.diagnostics import HeadReport, ImplicitPriorReport, fit_prior, head_report, strongest_keys
from eotattn.diagnostics.quantities import CERTIFICATE, TOKEN_QUANTITIES, VALUE_QUANTITIES
from eotattn.integrations.frames import is_cross_attention
from eotattn.integrations.residuals import Residuals
from eotattn.provenance import Table

__all__ = ["Analysis", "Page", "summarize"]


@dataclass(frozen=True)
class Page:
    """The page of an analysis, which a notebook draws where it is the last line of a cell.

    Args:
        html: The whole page.
        height: Of the frame in a notebook, pixels.
    """

    html: str
    height: int

    def __repr__(self) -> str:
        """What it is, where nothing draws it."""
        return f"a page of {len(self.html) / 1e6:.1f} MB; a notebook draws it, analyze(..., out=...) writes it"

    def _repr_html_(self) -> str:
        content = html.escape(self.html, quote=True)
        style = f"width:100%;height:{self.height}px;border:1px solid #8888"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{content}"></iframe>'


@dataclass(frozen=True, eq=False)
class Analysis(Summary, Table):
    """Everything that was found; prints as a table of layers."""

    def __str__(self) -> str:
        """The table of heads, averaged by layer."""
        return str(self.heads)

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """One row a layer and head: every quantity with its interval, what positions explain, kinds."""
        return head_columns(self)

    to_dict = columns

    def show(self, *, height: int = 800) -> Page:
        """The page, for the last line of a notebook's cell, where it is drawn.

        Args:
            height: Of the frame, pixels.

        Example:
            >>> from eotattn.analysis import analyze
            >>> analyze(attention=torch.full((1, 2, 4, 4), 0.25)).show()._repr_html_()[:7]
            '<iframe'
        """
        return Page(page(self), height)

    def _repr_html_(self) -> str:
        """What was found, and the table of heads."""
        found = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(self))
        return f"<p>{html.escape(str(self.subject))}</p><ul>{found}</ul>{super()._repr_html_()}"

    def to_circuitsvis(self, layer: str | int, *, text: int = 0) -> dict[str, Any]:
        """Arguments of ``circuitsvis.attention.attention_patterns`` and ``attention_heads``.

        Args:
            layer: Name, or number in the model.
            text: Which of the texts whose pairs were kept.

        Returns:
            ``tokens``, W strings, and ``attention`` (H, W, W) float32: of every query the four strongest weights among
            the first tokens; all others are zero.

        Raises:
            ValueError: If there is no such layer or text.

        Example:
            >>> from eotattn.analysis import analyze
            >>> analyze(attention=torch.full((1, 2, 4, 4), 0.25)).to_circuitsvis(0)["attention"].shape
            (2, 4, 4)
        """
        names_of = dict(zip(self.heads.numbers, self.heads.layers, strict=True))
        name = names_of.get(layer, "") if isinstance(layer, int) else layer
        remedy = "Choose one that was analysed"
        require(name in self.top_keys, "to_circuitsvis", "layer", f"be among {list(self.top_keys)}", layer, remedy)
        kept = self.top_keys[name]
        (text,) = check_indices("to_circuitsvis", "text", [text], kept.key.shape[0])
        names = self.tokens[text] if self.tokens else tuple(map(str, range(kept.key.shape[2])))
        count = min(len(names), kept.key.shape[2])
        return {"tokens": list(names[:count]), "attention": kept.dense(count)[text, :, :count].numpy()}

    def to_bertviz(self, *, text: int = 0) -> dict[str, Any]:
        """Arguments of ``bertviz.head_view`` and ``bertviz.model_view``.

        Args:
            text: Which of the texts whose pairs were kept.

        Returns:
            ``tokens``, W strings, and ``attention``, A tensors (1, H, W, W), as :meth:`to_circuitsvis` has them.

        Raises:
            ValueError: If there is no such text, or layers differ in heads.
        """
        layers = [self.to_circuitsvis(name, text=text) for name in self.top_keys]
        return {
            "tokens": layers[0]["tokens"],
            "attention": [torch.from_numpy(found["attention"])[None] for found in layers],
        }


def summarize(
    found: Sequence[TextFindings],
    *,
    subject: Subject | None = None,
    num_given: int = 1,
    num_cut: int = 0,
    chosen_heads: Sequence[int] | None = None,
) -> Analysis:
    """Put the findings of all texts together; ``chosen_heads`` numbers the heads where not all were kept."""
    names = list(dict.fromkeys(name for part in found for name in part.statistics))
    statistics = {name: merged([part.statistics[name] for part in found]) for name in names}
    values = {n: merged([part.values[n] for part in found]) for n in names if all(n in part.values for part in found)}
    gaps = {n: [part.certificates[n] for part in found if n in part.certificates] for n in names}
    certificates = {name: torch.cat(parts) for name, parts in gaps.items() if parts}
    scores = {n: merged(scores) for n in names if (scores := [p.token_scores[n] for p in found if n in p.token_scores])}
    top_keys = {n: merged(kept) for n in names if (kept := [part.top_keys[n] for part in found if n in part.top_keys])}
    square = {layer: stats for layer, stats in statistics.items() if not is_cross_attention(layer)}
    priors = {layer: fit_prior(stats) for layer, stats in square.items() if _has_prior(stats)}
    residuals = merged([part.residuals for part in found])
    heads = head_report(statistics, values=values, certificates=certificates, token_scores=scores)
    numbers = {name: number for part in found for name, number in part.numbers.items()}
    heads = replace(heads, numbers=tuple(numbers.get(name, a) for a, name in enumerate(names)))
    heads = heads if chosen_heads is None else replace(heads, heads=tuple(chosen_heads))
    tokens = tuple(names for part in found for names in part.tokens)
    known = len(tokens) > 0 and all(tokens) and all(stats.num_sequences == len(tokens) for stats in statistics.values())
    return Analysis(
        heads=heads,
        priors=priors,
        statistics=statistics,
        values=values,
        residuals=residuals,
        strongest=strongest_keys(statistics, tokens=tokens if known else None),
        top_keys=top_keys,
        tokens=tokens if known else (),
        loss=np.array([loss for part in found for loss in part.loss or [math.nan] * part.count]),
        subject=subject or Subject.today("a model"),
        num_texts=sum(part.count for part in found),
        num_given=num_given,
        num_cut=num_cut,
        needs=_needs(heads, priors, residuals, sum(part.count for part in found)),
    )


def _has_prior(stats: SequenceStatistics) -> bool:
    """Whether rows sum to one and attention is square, more than one token long."""
    keys = int((stats.column_count > 0).sum(-1).max())
    plain = float(stats.sums["explicit_sink_mass"].sum()) == 0
    return plain and 1 < keys <= int(stats.num_queries.max())


def _needs(
    heads: HeadReport, priors: dict[str, ImplicitPriorReport], residuals: Residuals, count: int
) -> dict[str, str]:
    """What could not be computed, and what it takes."""
    missing: dict[str, str] = {}
    for group in (TOKEN_QUANTITIES, VALUE_QUANTITIES, (CERTIFICATE,)):
        for quantity in group:
            grid = heads.mean.get(quantity.name)
            where = [name for a, name in enumerate(heads.layers) if grid is None or np.isnan(grid[a]).all()]
            if where:
                places = "all layers" if len(where) == len(heads.layers) else ", ".join(where)
                missing[quantity.name] = f"needs {quantity.needs}; {places} did not show that"
    without = [name for name in heads.layers if name not in priors]
    if without:
        missing["implicit prior"] = f"needs square attention without explicit sinks; not so in {', '.join(without)}"
    if not residuals.blocks:
        missing["residual norms"] = "needs a running model with its blocks in an nn.ModuleList"
    if count < 2:
        missing["intervals"] = "needs two texts or more"
    return missing
