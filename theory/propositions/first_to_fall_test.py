from theory.propositions.first_to_fall import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
