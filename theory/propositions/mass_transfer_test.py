from theory.propositions.mass_transfer import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
