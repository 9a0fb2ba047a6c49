"""Attention as entropic optimal transport: state a problem, solve it, read a certified solution.

``TransportProblem -> solve(problem, solver=...) -> TransportSolution``. The same problems can be solved by POT through
``eotattn.transport.pot``, which is imported only by those who ask for it.

``score`` is the raw affinity (cost = -score); ``epsilon`` is the temperature in units of the score, SDPA's ``scale`` is
its inverse. A coupling has total mass one, the rows of attention weights sum to one. A query without admissible keys,
and numbers that are no numbers, are refused.
"""

from eotattn.transport.certificates.certificate import Certificate, certify
from eotattn.transport.divergence import sinkhorn_divergence
from eotattn.transport.problems import TransportProblem, Tsallis
from eotattn.transport.problems.dummy_key import with_dummy_key
from eotattn.transport.sinkhorn_attention import SinkhornAttention
from eotattn.transport.solution import TransportSolution
from eotattn.transport.solvers.anderson import Anderson
from eotattn.transport.solvers.automatic import Auto
from eotattn.transport.solvers.closed_form import ClosedForm
from eotattn.transport.solvers.newton import Newton
from eotattn.transport.solvers.sinkhorn import Sinkhorn
from eotattn.transport.solvers.solver import Solver
from eotattn.transport.solving import solve

__all__ = [
    "Anderson",
    "Auto",
    "Certificate",
    "ClosedForm",
    "Newton",
    "Sinkhorn",
    "SinkhornAttention",
    "Solver",
    "TransportProblem",
    "TransportSolution",
    "Tsallis",
    "certify",
    "sinkhorn_divergence",
    "solve",
    "with_dummy_key",
]
