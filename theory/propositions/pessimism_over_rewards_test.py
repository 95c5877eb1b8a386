from theory.propositions.pessimism_over_rewards import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
