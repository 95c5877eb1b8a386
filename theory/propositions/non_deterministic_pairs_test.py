import pytest

from theory.propositions.non_deterministic_pairs import CLAIMS
from theory.testing import claim_tests

pytestmark = pytest.mark.slow
globals().update(claim_tests(CLAIMS))
