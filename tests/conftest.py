"""Lets every test import ``ranks`` and ``toys`` by name, and gives every process of the suite one thread.

Sums depend, to the bit, on the number of threads: what runs here must equal what runs in a process of its own.
"""

import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parent))
