"""Solvers of problems with a key marginal: one step each, and the loop that repeats it."""
