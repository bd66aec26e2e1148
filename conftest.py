"""Tests run small matrices: one thread is faster, and does not fight with whatever runs beside them."""

import torch

torch.set_num_threads(1)
