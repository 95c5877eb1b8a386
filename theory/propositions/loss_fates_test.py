from theory.propositions.loss_fates import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
