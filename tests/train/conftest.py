import pytest

from tests.train.tiny import adapted


@pytest.fixture(scope="module")
def model():
    return adapted()
