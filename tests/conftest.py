"""One process for all tests that has imported SGLang: it forks servers and engines."""

import forge as forges
import pytest


@pytest.fixture(scope="session")
def forge():
    return forges.shared()
