"""Optimizers of other packages train inside the wrapper as they do by themselves; `make third-party` installs them."""

import pytest

for package in ("pytorch_optimizer", "schedulefree", "heavyball", "bitsandbytes"):
    pytest.importorskip(package)

from benchmarks.third_party import AS_BARE, NO, SAME, cases, check, train  # noqa: E402

pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]  # the warnings of the packages
CASES = cases()


def each(chosen):
    return pytest.mark.parametrize("case", chosen, ids=lambda case: f"{case.package} {case.name}")


@each([case for case in CASES if not case.cannot])
def test_it_trains_to_the_bits_of_the_bare_optimizer(case):
    result = check(case)
    assert result["plain"] == SAME
    if case.unsteerable:
        assert case.unsteerable in result["steered"]
    else:
        assert result["steered"] == SAME
    assert result["resumed"] in (SAME, AS_BARE)
    assert result["train/eval"] != NO


@each([case for case in CASES if case.cannot])
def test_what_is_listed_as_unable_to_train_is(case):
    assert isinstance(train(case, "bare"), str)
