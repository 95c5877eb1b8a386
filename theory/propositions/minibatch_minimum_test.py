from theory.propositions.minibatch_minimum import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
