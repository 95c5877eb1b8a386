from theory.propositions.drdo_preference_term import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
