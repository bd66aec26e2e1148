"""Match the heads and neurons of two models by linear assignment."""
