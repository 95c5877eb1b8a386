from theory.propositions.loss_definitions import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
