from theory.propositions.dpo_flow import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
