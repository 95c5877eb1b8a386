from theory.propositions.bag_of_words_winner import CLAIMS
from theory.testing import claim_tests

globals().update(claim_tests(CLAIMS))
