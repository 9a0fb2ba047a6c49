"""What a transport problem states: scores and log-prior of all pairs, dense or as factors, and marginals."""

from eotattn.transport.problems.problem import TransportProblem

__all__ = ["TransportProblem"]
