"""What a transport problem states: scores and log-prior of all pairs, dense or as factors, and marginals."""

from eotattn.transport.problems.problem import TransportProblem
from eotattn.transport.problems.regulariser import Tsallis

__all__ = ["TransportProblem", "Tsallis"]
