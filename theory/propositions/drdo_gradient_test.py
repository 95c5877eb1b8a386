from theory.propositions.drdo_gradient import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
