"""What a module is: traces, residual units, chains, plans. Reads models and graphs, changes none."""
