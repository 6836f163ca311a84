"""One thread, fixed seeds: a test that passes here passes again, and two that run side by side do not fight."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: it is read but once
settings.register_profile("headway", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("headway")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
