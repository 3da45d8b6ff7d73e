"""Random single operations for the kernel tests: a fast generator of valid cases, awkward sizes and corner values."""

from __future__ import annotations

import numpy as np
import pytest
from support.random_operations import MAKERS, random_case

from swincompress_pl.spec.kinds import KINDS, check_operation
from swincompress_pl.spec.spiking_kinds import SPIKING_KINDS


def test_generator_covers_every_kind_of_the_norm() -> None:
    assert set(MAKERS) == set(KINDS) - set(SPIKING_KINDS), "of spiking networks: spiking_programs.py"


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_generated_cases_are_valid(kind: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        case = random_case(rng, kind)
        value = check_operation(case.operation, case.inputs, case.tensors)
        assert case.expected().reshape(case.arrays[0].shape[0], *value.shape).dtype.name == case.dtype
