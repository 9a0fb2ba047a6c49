"""Benchmarks: times, memory and errors against installed peers, in one process; tables out.

:data:`eotattn.benchmarks.suites.SUITES` lists what ``eotattn bench`` can run.
"""
