"""Random training programs, held against the dense float64 model of `fuzzing.py`, and interrupts at any line."""

import os

from fuzzing import Program, Run, programs
from hypothesis import HealthCheck, given, settings

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(precise=True))
def test_programs_in_float64(program: Program):
    Run(program).run()


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(precise=False))
def test_programs_of_many_dtypes(program: Program):
    Run(program).run()
