import pytest

from theory.propositions.pessimistic_dpo_pair_optimum import CLAIMS
from theory.testing import claim_tests

pytestmark = pytest.mark.slow
globals().update(claim_tests(CLAIMS))
