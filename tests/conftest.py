"""Lets every test import ``ranks`` and ``toys`` by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
