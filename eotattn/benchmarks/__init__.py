"""Benchmarks: times, memory and errors against installed peers, in one process; tables out.

One file a kind of peer, one file a suite; :data:`eotattn.benchmarks.suites.SUITES` lists what ``eotattn bench`` can run.
"""
