"""The toy task for the oracles; everything here needs torch and runs in the oracle environment."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
