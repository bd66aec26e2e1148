"""Settings of the whole suite."""

import torch

pytest_plugins = ["rotdistill_core.testing.pytest_plugin"]

# Tests run small matrices: one thread is faster, and leaves the other core to the other worker.
torch.set_num_threads(1)
