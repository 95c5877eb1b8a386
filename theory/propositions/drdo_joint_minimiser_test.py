from theory.propositions.drdo_joint_minimiser import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
