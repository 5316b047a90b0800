"""Lets the tests import their neighbours (`grpo_loss_laws`, `audit_estimators`), which are no test modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
