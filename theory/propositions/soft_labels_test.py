from theory.propositions.soft_labels import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
