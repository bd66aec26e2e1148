"""Files of runs: atomic writes, the ledger that commits them, and the output of one step."""
