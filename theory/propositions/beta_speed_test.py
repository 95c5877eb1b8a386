from theory.propositions.beta_speed import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
