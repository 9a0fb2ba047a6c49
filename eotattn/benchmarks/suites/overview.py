"""The figures that the package answers for on a GPU, in one run of minutes: costs as ratios, and precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from eotattn.benchmarks.suites.configuration import Configuration
from eotattn.benchmarks.suites.decode import decode_step
from eotattn.benchmarks.suites.gradients import slope_errors
from eotattn.benchmarks.suites.inputs import content, measured
from eotattn.benchmarks.suites.layer import COMPILED, compiled, layer_makers, step
from eotattn.benchmarks.suites.precision import output_errors, total_variation
from eotattn.benchmarks.suites.training_step import training
from eotattn.benchmarks.timing import Candidate, Row, reason

__all__ = ["overview"]

#: Ways to have the prior, in every form of a layer.
LAYERS = ("bare", "eotattn, GOAT, 4 frequencies, reserved", "eotattn, GOAT, 4 frequencies, appended")


def overview(config: Configuration) -> Iterator[Row]:
    """Layers, training and decoding steps over bare ones, and errors over plain ones; a part that fails says so.

    The first name of every group is what the ratios of the group refer to. Each part ends with the seconds it took.
    """
    for part in (_precision, _gradients, _decoding, _layers, training):
        start = time.perf_counter()
        yield from _guarded(part, config)
        yield {"quantity": "seconds", "name": part.__name__.strip("_"), "value": time.perf_counter() - start}


def _guarded(part: Callable[[Configuration], Iterable[Row]], config: Configuration) -> Iterator[Row]:
    try:
        yield from part(config)
    except Exception as error:  # the other parts are worth their minutes, and the table says what failed
        yield {"quantity": part.__name__.strip("_"), "name": "eotattn", "failure": reason(error)}


def _layers(config: Configuration) -> list[Row]:
    """Forward and backward of a layer over the bare one in the same form: eager, compiled, as a graph."""
    small, full = [(2, 32, 64, 2)], [(8, 2048, 768, 12), (2, 8192, 1024, 16), (2, 8192, 1024, 8)]
    rows: list[Row] = []
    for batch, length, width, heads in config.pick(small, full):
        x = content(config, batch, length, width)
        makers = layer_makers(config, width, heads)
        size = {"batch": batch, "length": length, "width": width, "heads": heads}
        forms: dict[str, Callable[[Callable[[], Any]], Callable[[], Any]]] = {"eager": lambda make: make}
        if config.device != "cpu":
            forms |= {form: partial(partial, compiled, mode=mode) for form, mode in COMPILED.items()}
        for form, changed in forms.items():
            torch.compiler.reset()  # or the next size would be compiled for any size
            names = LAYERS if form != "compiled into graphs" else LAYERS[:2]
            candidates = [Candidate(name, partial(step, changed(makers[name]), x)) for name in names]
            rows += [{"quantity": "layer", **size, "form": form, **row} for row in measured(candidates, config)]
    return rows


def _decoding(config: Configuration) -> Iterator[Row]:
    """One new token against a cache, over a fused call that appends to a cache and has no prior."""
    shapes = config.pick([(1, 4, 2, 64, 32)], [(8, 32, 8, 2048, 128), (8, 32, 8, 32768, 128)])
    yield from ({"quantity": "decode", **row} for shape in shapes for row in decode_step(config, shape))


def _precision(config: Configuration) -> list[Row]:
    """Errors of outputs over plain ones, and total variation of the recency prior in both 16-bit dtypes."""
    rows: list[Row] = []
    for length in config.pick([256], [2048, 8192, 32768, 131072]):
        rows += output_errors(replace(config, dtype="bfloat16"), length)
    for dtype in ("bfloat16", "float16"):
        for length in config.pick([256], [131072, 1048576]):
            rows += [{**row, "dtype": dtype} for row in total_variation(replace(config, dtype=dtype), length)]
    return rows


def _gradients(config: Configuration) -> list[Row]:
    """Gradients of slopes: bfloat16, and float32 where positions are large."""
    rows: list[Row] = []
    for length in config.pick([128], [8192, 32768]):
        rows += slope_errors(replace(config, dtype="bfloat16"), length)
    for length in config.pick([256], [131072]):
        rows += slope_errors(replace(config, dtype="float32"), length, heads=2, offsets=(0, 1_000_000))
    return rows
