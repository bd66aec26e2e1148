"""Files of runs: atomic writes, the ledger that commits them, and the place a step writes to."""
