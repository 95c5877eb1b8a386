from theory.propositions.ipo_as_distillation import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
