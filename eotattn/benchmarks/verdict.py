"""The bounds that the project set itself, judged by the tables that were measured: held, missed, or not measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eotattn.benchmarks.timing import Row

__all__ = ["RULES", "Rule", "judge", "read_records", "read_tables"]

#: Tables by the name of their suite; cells are text.
Tables = Mapping[str, Sequence[Mapping[str, str]]]


@dataclass(frozen=True)
class Rule:
    """One bound: the largest number that rows of a table may hold.

    Args:
        what: In words.
        bound: The number, in the unit of the column.
        suite: Table to look in.
        name: Of the rows.
        column: What is bounded.
        where: Other columns of the rows, and what they hold.
        over: Rows by which the number is divided, those of the same suite and columns that have this name.
        limit: Rows that say what hardware and stock kernels leave, likewise: where they are not within the bound, no
            prior could be.
    """

    what: str
    bound: float
    suite: str
    name: str
    column: str = "ratio"
    where: Mapping[str, Any] = field(default_factory=dict)
    over: str | None = None
    limit: str | None = None

    def measured(self, tables: Tables) -> float | None:
        """The largest number found, or ``None`` where a table, a row or a number is missing."""
        return self._largest(tables, self.name)

    def limited(self, tables: Tables) -> float | None:
        """The same number of the rows that limit, or ``None`` where there are none."""
        return None if self.limit is None else self._largest(tables, self.limit)

    def _largest(self, tables: Tables, name: str) -> float | None:
        found = self._numbers(tables, name)
        if self.over is None or not found:
            return max(found, default=None)
        below = self._numbers(tables, self.over)
        return max(found) / min(below) if below else None

    def _numbers(self, tables: Tables, name: str) -> list[float]:
        where = {"name": name, **self.where}
        rows = [row for row in tables.get(self.suite, ()) if all(row.get(k) == str(v) for k, v in where.items())]
        cells = [row.get(self.column) for row in rows]
        return [float(cell) for cell in cells if cell] if all(cells) else []  # what failed is not held by the rest


def judge(tables: Tables, rules: Sequence[Rule] | None = None) -> list[Row]:
    """Hold every rule against the tables.

    Args:
        tables: See ``read_tables``.
        rules: ``RULES`` by default.

    Returns:
        One row a rule: ``what``, ``measured``, ``bound`` and ``verdict``: ``"held"``, ``"missed by 12%"`` (of the
        bound) or ``"not measured"``; ``limit`` names the rows that limit, and ``limited`` is their number.

    Example:
        >>> rule = Rule("time", 1.5, "layer", "ours")
        >>> [row["verdict"] for row in judge({"layer": [{"name": "ours", "ratio": "1.8"}]}, [rule])]
        ['missed by 20%']
    """
    return [_judged(rule, tables) for rule in (RULES if rules is None else rules)]


def _judged(rule: Rule, tables: Tables) -> Row:
    measured, limited = rule.measured(tables), rule.limited(tables)
    verdict = "not measured"
    if measured is not None:
        excess = measured / rule.bound - 1
        verdict = "held" if measured <= rule.bound else f"missed by {excess:.0%}"
    row: Row = {"what": rule.what, "measured": measured, "bound": rule.bound, "verdict": verdict}
    return {**row, "limit": "" if limited is None else rule.limit, "limited": limited}


def read_tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Every ``bench_<suite>.csv`` of a folder, by suite."""
    tables = {}
    for path in sorted(folder.glob("bench_*.csv")):
        with path.open(newline="") as file:
            tables[path.stem.removeprefix("bench_")] = list(csv.DictReader(file))
    return tables


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every ``bench_<suite>.json`` of a folder, by suite: where each table comes from."""
    return {
        path.stem.removeprefix("bench_"): json.loads(path.read_text()) for path in sorted(folder.glob("bench_*.json"))
    }


_FORWARD, _BOTH = {"pass": "forward"}, {"pass": "forward+backward"}
_SINK, _GOAT = "recency + sink", "GOAT, 4 frequencies"
_RESERVED = f"eotattn, {_SINK}, reserved"
#: The stock kernel on wider queries and keys, with nothing in the columns.
_EMPTY_COLUMNS, _DECODED_COLUMNS = "SDPA alone, 48 columns more", "SDPA alone, 32 columns more"


def _precision_rules() -> list[Rule]:
    rules = []
    for length, bound in ((131072, 1e-3), (1048576, 5e-3)):
        at = {"quantity": "total variation", "length": length}
        for column, text in (("mean", "mean over rows and heads"), ("value", "worst row of all heads")):
            what = f"total variation of the recency prior at {length}, {text}"
            rules.append(Rule(what, bound, "precision", "digit lanes", column, at))
    what = "output error with the GOAT prior over plain bfloat16's, worst length"
    rules.append(Rule(what, 1.5, "precision", "eotattn, GOAT", where={"quantity": "output error"}))
    for length, bound in ((8192, 0.1), (32768, 0.3)):
        for slopes in ("slopes ALiBi", "slopes 0.5"):
            for column, text in (("value", "all heads"), ("worst_head", "worst head")):
                what = f"gradient of {slopes} at {length}, {text}: error over signal"
                rules.append(Rule(what, bound, "gradients", slopes, column, {"length": length}))
    return rules


def _kernel_rules() -> list[Rule]:
    rules = []
    for width in (64, 128):
        for direction, bound in ((_FORWARD, 1.2), (_BOTH, 1.4)):
            at, text = {"width": width, **direction}, f"width {width}, {direction['pass']}"
            for prior in (_SINK, _GOAT):
                name = f"SDPA alone, {prior} within its columns"
                rules.append(Rule(f"kernel with reserved lanes, {prior}, {text}", 1.02, "attention", name, where=at))
                what, name = f"appended lanes, {prior}, {text}", f"eotattn, {prior}, appended"
                rules.append(Rule(what, bound, "attention", name, where=at, limit=_EMPTY_COLUMNS))
        for rival, bound in (("FlexAttention, learnable key bias", 1 / 2), ("dense learnable bias", 1 / 8)):
            what, at = f"reserved lanes over {rival}, width {width}", {"width": width, **_BOTH}
            rules.append(Rule(what, bound, "attention", _RESERVED, "median_ms", at, over=rival))
    return rules


def _layer_rules() -> list[Rule]:
    rules = []
    for length, bound in ((2048, 1.15), (8192, 1.10)):
        at = {"length": length}
        what, graphs = f"layer, {length} tokens, reserved, eager", f"{_RESERVED}, compiled into graphs"
        rules.append(Rule(what, bound, "layer", _RESERVED, where=at, limit=graphs))
        for kind in ("compiled", "compiled into graphs"):
            what = f"layer, {length} tokens, reserved, both {kind}"
            rules.append(Rule(what, 1.08, "layer", f"{_RESERVED}, {kind}", "median_ms", at, over=f"bare, {kind}"))
        padded = f"{_RESERVED}, padded"
        rules.append(Rule(f"layer, {length} tokens, padded: time", 1.25, "padding", padded, where=at))
        rules.append(Rule(f"layer, {length} tokens, padded: memory", 1.3, "padding", padded, "peak_ratio", at))
    rules.append(Rule("layer on a CPU, float32, 512 tokens", 1.10, "layer on a CPU", _RESERVED, where={"length": 512}))
    for length in (2048, 32768):
        for lanes, limit in (("reserved", "SDPA, no prior, appending to a cache"), ("appended", _DECODED_COLUMNS)):
            name, at = f"eotattn, {_SINK}, {lanes}", {"length": length, "width": 128}
            what = f"decoding step, cache of {length}, {lanes}"
            rules.append(Rule(what, 1.15, "decode", name, where=at, limit=limit))
    return rules


def _transport_rules() -> list[Rule]:
    at = {"quantity": "iterations", "length": 32768}
    ours, forwards = "eotattn, 100 iterations", "200 SDPA forwards"
    rules = [Rule("iteration over two SDPA forwards", 1.25, "transport", ours, "median_ms", at, over=forwards)]
    at, ours = {"quantity": "memory", "length": 131072}, "eotattn, bfloat16 kernel"
    rules.append(Rule("memory of a solution at 131072, MiB", 1e9 / 2**20, "transport", ours, "peak_mib", at))
    for epsilon, threshold in ((3.2, 1e-4), (3.2, 1e-6), (1.6, 1e-5)):
        at = {"quantity": "equal errors", "epsilon": epsilon, "threshold": threshold}
        for rival in ("POT, sinkhorn_log", "OTT, Sinkhorn"):
            what = f"solution over {rival}, epsilon {epsilon}, threshold {threshold:g}"
            ours = "eotattn, streaming, bf16 kernel"
            rules.append(Rule(what, 0.1, "transport", ours, "median_ms", at, over=rival))
    for length in (10000, 50000):
        at, rival = {"quantity": "equal iterations", "length": length}, "flash-sinkhorn, tf32"
        what = f"100 iterations over {rival}, {length} points"
        rules.append(Rule(what, 1.0, "transport", "eotattn, bf16 kernel", "median_ms", at, over=rival))
    for kind in ("balanced", "unbalanced"):
        for column in ("key_mass", "query_mass"):
            what = f"{column.replace('_', ' ')} in float32, {kind}, largest relative error"
            at = {"quantity": "precision"}
            rules.append(Rule(what, 1e-5, "transport", f"{kind}, fp32 kernel", column, at))
    at = {"quantity": "closed form"}
    rules.append(Rule("gap of fused attention in float64", 1e-12, "transport", "SDPA, fp64", "gap", at))
    return rules


def _statistics_rules() -> list[Rule]:
    at, ours = {"quantity": "time", "length": 131072}, "eotattn, no prior"
    time = Rule("all statistics at 131072 over one SDPA forward", 8.0, "statistics", ours, where=at)
    return [time, Rule("memory of all statistics at 131072, MiB", 2e9 / 2**20, "statistics", ours, "peak_mib", at)]


#: What the project asks of one H200 in bfloat16, and of a CPU where a rule says so.
RULES: tuple[Rule, ...] = (
    *_precision_rules(),
    *_kernel_rules(),
    *_layer_rules(),
    *_transport_rules(),
    *_statistics_rules(),
)
