from theory.propositions.pessimistic_dpo_pair_optimum import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
