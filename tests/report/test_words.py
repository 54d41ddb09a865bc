"""What a run came to, in words."""

import pytest
from helpers.profiles import make_confirmed, make_profile, make_quality

from absorb_plugin.report import words
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


def test_what_a_quantisation_costs_is_told_beside() -> None:
    quantization = {"modifiers": ["QuantizationModifier"]}
    quantization |= {"loss_increase": 0.0123, "standard_error": 0.001}
    quality = make_quality(quantization=quantization)
    profile = make_profile(confirmed=make_confirmed(), quality=quality)
    told = words.quality_sentence(profile)
    assert "Pruning to it and quantising cost 0.080 ± 0.008" in told
    assert "quantising alone 0.012; max_loss_increase is 0.1." in told
    assert "judged by SparseGPT and quantised:" in words.gain_sentence(profile)
    found = words.quality_found(profile)
    assert found is not None and found["quantization_loss_increase"] == 0.0123
    plain = make_profile(confirmed=make_confirmed(), quality=make_quality())
    assert "Pruning to it costs 0.080 ± 0.008" in words.quality_sentence(plain)
    assert "judged by SparseGPT:" in words.gain_sentence(plain)
