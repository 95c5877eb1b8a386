import pytest

from theory.propositions.dpo_flow import CLAIMS
from theory.testing import claim_tests

pytestmark = pytest.mark.slow
globals().update(claim_tests(CLAIMS))
