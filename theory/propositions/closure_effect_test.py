from theory.propositions.closure_effect import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
