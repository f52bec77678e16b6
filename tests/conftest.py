"""One thread, so that results are the same to the bit, the repository root on the path, and shared fixtures."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the drivers that tests start, too
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # only tests/test_gpu.py computes on a GPU, when it is told which
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hypothesis  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from runs import base, small_world  # noqa: E402, F401 (fixtures of several files)

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # no thread of its own: tests start processes
hypothesis.settings.register_profile("fixed", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("fixed")
