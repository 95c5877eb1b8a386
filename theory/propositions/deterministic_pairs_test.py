from theory.propositions.deterministic_pairs import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
