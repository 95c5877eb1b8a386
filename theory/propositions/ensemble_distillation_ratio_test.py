from theory.propositions.ensemble_distillation_ratio import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
