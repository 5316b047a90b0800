"""Store the records that TRL and verl make, for tests where neither is installed.

hatch run oracles:python libs/grpo-contracts/tests/oracles/write_trainer_records.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from trainer_records import trl_cases, verl_cases

if __name__ == "__main__":
    cases = {name: case for cases in (trl_cases(), verl_cases()) for name, case in cases}
    # Labels are objects in verl's batch, and no pickle is stored.
    arrays = {
        f"{name}/{key}": array.astype(str) if array.dtype == object else array
        for name, case in cases.items()
        for key, array in case.pop("record").items()
    }
    versions = {name: version(name) for name in ("trl", "verl", "transformers", "torch")}
    target = Path(__file__).parent / "trainer_records.npz"
    np.savez_compressed(target, cases=np.array(json.dumps(cases)), versions=np.array(json.dumps(versions)), **arrays)
    print(f"{list(cases)} written to {target}")
