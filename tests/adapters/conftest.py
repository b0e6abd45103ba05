"""Fixtures of the tests of adapters."""

import pytest
from adapter_zoo import make_vit


@pytest.fixture
def vit():
    """A small ViT of timm."""
    return make_vit()
