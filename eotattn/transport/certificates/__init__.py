"""How far a candidate is from the optimum, in float64, whatever kernel found it."""
