from theory.propositions.distillation_recovers_rlhf import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
