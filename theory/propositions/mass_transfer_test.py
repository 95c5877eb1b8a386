import numpy as np
import pytest
from scipy.special import expit

from theory.propositions.mass_transfer import CLAIMS, dpo, slope_and_curvature
from theory.testing import claim_tests

pytestmark = pytest.mark.slow
globals().update(claim_tests(CLAIMS))


def test_slopes_of_any_margin_are_numbers() -> None:
    """Without a warning, which is an error in tests."""
    margins, beta = np.array([-1e4, -30.0, 0.0, 1.5, 35.5, 60.0, 71.0, 1e4]), 10.0
    slope, curvature = (function(margins, np.zeros(8), beta) for function in slope_and_curvature(dpo))
    falling = expit(-beta * margins)
    np.testing.assert_allclose(slope, -beta * falling, rtol=1e-12, atol=1e-140)
    np.testing.assert_allclose(curvature, beta**2 * falling * expit(beta * margins), rtol=1e-12, atol=1e-140)
