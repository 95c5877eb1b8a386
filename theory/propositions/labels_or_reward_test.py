import pytest

from theory.propositions.labels_or_reward import CLAIMS
from theory.testing import claim_tests

pytestmark = pytest.mark.slow
globals().update(claim_tests(CLAIMS))
