"""What a run came to, in words."""

import pytest
from helpers.profiles import make_confirmed, make_profile, make_quality

from absorb_plugin.report.words import quality_found


def found(chosen: str, **losses: float) -> dict[str, float | None]:
    confirmed = make_confirmed(chosen, **losses)
    profile = make_profile(quality=make_quality(), confirmed=confirmed)
    result = quality_found(profile)
    assert result is not None
    return result


def test_the_error_is_that_of_the_allocation_that_was_judged() -> None:
    known = found("searched")
    assert known["loss_increase"] == 0.08 and known["standard_error"] == 0.008
    # the search came to the very allocation that has another name too
    same = found("uniform", searched=4.25, uniform=4.25)
    assert same == known
    other = found("uniform", searched=4.25, uniform=4.2)
    assert other["loss_increase"] == pytest.approx(0.03)
    assert other["standard_error"] is None
