import pytest

from theory.propositions.first_to_fall import CLAIMS
from theory.testing import claim_tests

pytestmark = pytest.mark.slow
globals().update(claim_tests(CLAIMS))
