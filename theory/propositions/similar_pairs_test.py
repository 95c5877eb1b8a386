from theory.propositions.similar_pairs import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
