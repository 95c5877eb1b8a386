from theory.propositions.bradley_terry_sampling import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
