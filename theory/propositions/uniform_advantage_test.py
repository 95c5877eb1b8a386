from theory.propositions.uniform_advantage import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
