from theory.propositions.alpha_budget import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
