"""The same problems through POT, the independent oracle. The only folder that imports it."""

from eotattn.transport.pot.free_keys import fixed_key_marginal, majorization, quasi_newton
from eotattn.transport.pot.solvers import PotSolution, log_sinkhorn, solve

__all__ = ["PotSolution", "fixed_key_marginal", "log_sinkhorn", "majorization", "quasi_newton", "solve"]
