from theory.propositions.labels_or_reward import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
