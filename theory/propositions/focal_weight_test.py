from theory.propositions.focal_weight import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
