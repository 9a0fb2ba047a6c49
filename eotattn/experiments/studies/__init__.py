"""Studies: each trains what one figure needs, measures it, and says whether the figure's claim held."""
