"""The integer specification: what every number of a compressed network is, in NumPy and without torch.

A `Program` is the network as data. `check` proves that it cannot overflow, and `run` defines its result. The page
"The integer specification" (`docs/explanation/spec.md`) derives the rules.
"""

from swincompress_pl.spec.integer import EXP_STEPS, LIMITS, STORAGE, multiplier
from swincompress_pl.spec.program import INPUT_VALUE, InputDescription, Operation, Output, Program, ProgramError, Value
from swincompress_pl.spec.readings import binary_steps
from swincompress_pl.spec.reference import Cost, check, costs, run, run_outputs, steps

__all__ = [
    "EXP_STEPS",
    "INPUT_VALUE",
    "LIMITS",
    "STORAGE",
    "Cost",
    "InputDescription",
    "Operation",
    "Output",
    "Program",
    "ProgramError",
    "Value",
    "binary_steps",
    "check",
    "costs",
    "multiplier",
    "run",
    "run_outputs",
    "steps",
]
