"""Attention as entropic optimal transport: state a problem, solve it, read a certified solution.

``TransportProblem -> solve -> TransportSolution``. The same problems can be solved by POT through
``eotattn.transport.pot``, which is imported only by those who ask for it.
"""

from eotattn.transport.certificates.certificate import Certificate, certify
from eotattn.transport.dispatch import solve
from eotattn.transport.module import SinkhornAttention
from eotattn.transport.problems import TransportProblem
from eotattn.transport.solution import TransportSolution

__all__ = ["Certificate", "SinkhornAttention", "TransportProblem", "TransportSolution", "certify", "solve"]
