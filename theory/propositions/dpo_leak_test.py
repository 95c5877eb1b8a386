from theory.propositions.dpo_leak import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
