"""Make the examples importable by the path that their own imports use."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
