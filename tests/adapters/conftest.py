"""What the tests of several commands ask for."""

import pytest


@pytest.fixture
def families():
    """The module of tiny models, where transformers is there."""
    pytest.importorskip("transformers")
    import families

    return families
