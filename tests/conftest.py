"""A tiny bundle for every test that needs one: made with onnx alone, in milliseconds."""

import pytest

from tests.tiny import TinyModel, write_bundle


@pytest.fixture(scope="session")
def tiny_model():
    """Three experts, seven classes, 8x8 input; the reference for its bundle's answers."""
    return TinyModel()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model, tmp_path_factory):
    """The bundle of `tiny_model`, not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", tiny_model)


@pytest.fixture
def make_bundle(tmp_path):
    """Write a bundle of one's own: make_bundle(n_experts=1, version="8", ...)."""

    def make(n_experts=3, **fields):
        return write_bundle(tmp_path / "bundle", TinyModel(n_experts), **fields)

    return make
