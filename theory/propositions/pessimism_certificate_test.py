from theory.propositions.pessimism_certificate import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
