"""KVM, on any machine: the reference guest, traced under AMD's KVM in a Linux under TCG (test_kvm.py has more)."""

from __future__ import annotations

import pytest

from tests.live.nestedruns import FEW, Under, exactly_what_should_fail_does

pytestmark = pytest.mark.live


def test_one_is_sound_and_one_is_not_and_each_has_its_irqchip() -> None:
    assert len(FEW) == 2 and len({under.accel for under in FEW}) == len({under.run.fault for under in FEW}) == 2


@pytest.mark.parametrize("under", FEW, ids=str)
def test_exactly_what_should_fail_does_under_kvm(under: Under) -> None:
    exactly_what_should_fail_does(under)
