"""What holds at an optimum: responses of queries and keys, objectives, and gradients through the optimum."""
