"""Everything here needs torch, TRL and verl, and runs in the oracle environment."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
