from theory.propositions.ipo_spread import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
