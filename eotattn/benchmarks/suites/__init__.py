"""Suites: what ``eotattn bench`` can run, one file each, from a configuration to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from eotattn.benchmarks.suites.attention import attention
from eotattn.benchmarks.suites.configuration import Configuration, configure
from eotattn.benchmarks.suites.decode import decode
from eotattn.benchmarks.suites.gradients import gradients
from eotattn.benchmarks.suites.layer import layer
from eotattn.benchmarks.suites.overview import overview
from eotattn.benchmarks.suites.padding import padding
from eotattn.benchmarks.suites.parallel import parallel
from eotattn.benchmarks.suites.patterns import patterns
from eotattn.benchmarks.suites.precision import precision
from eotattn.benchmarks.suites.relative import relative
from eotattn.benchmarks.suites.ring import ring
from eotattn.benchmarks.suites.rotary_decoder import rotary
from eotattn.benchmarks.suites.sink_calls import sinks
from eotattn.benchmarks.suites.statistics import statistics
from eotattn.benchmarks.suites.training_step import training
from eotattn.benchmarks.suites.transport import transport
from eotattn.benchmarks.timing import Row

__all__ = ["SUITES", "Configuration", "configure"]

_ALL = (
    *(overview, attention, layer, training, rotary, decode, padding, patterns),
    *(relative, precision, gradients, sinks, transport, statistics, ring, parallel),
)

#: Every suite by name.
SUITES: dict[str, Callable[[Configuration], Iterator[Row]]] = {suite.__name__: suite for suite in _ALL}
