from theory.propositions.distillation_pair_optimum import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
