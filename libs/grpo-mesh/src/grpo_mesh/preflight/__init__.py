"""Preflight: does a set of compiled programs fit a TPU slice, and how fast can they be there?"""

from grpo_mesh.preflight._compile_only import compile_only
from grpo_mesh.preflight._peak import Comparison, Peak, measure_peak
from grpo_mesh.preflight._programs import Measured, Program, measure
from grpo_mesh.preflight._tables import GIB, format_bytes, format_si, programs_table, table
from grpo_mesh.preflight._verdict import EFFICIENCY, Phase, Verdict, judge, larger_slice
from grpo_mesh.preflight._work import Work

__all__ = [
    "EFFICIENCY",
    "GIB",
    "Comparison",
    "Measured",
    "Peak",
    "Phase",
    "Program",
    "Verdict",
    "Work",
    "compile_only",
    "format_bytes",
    "format_si",
    "judge",
    "larger_slice",
    "measure",
    "measure_peak",
    "programs_table",
    "table",
]
