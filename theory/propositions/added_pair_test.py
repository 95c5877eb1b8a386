from theory.propositions.added_pair import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
