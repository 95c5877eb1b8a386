"""What the tests of this room share."""

import pytest
from transformers import PreTrainedTokenizerBase

from tests import tiny


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Trained on a few words."""
    return tiny.tokenizer()
