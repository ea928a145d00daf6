"""What tests of exports share: the tiny cascade as a bundle that can be loaded by its folder."""

import pytest
from tiny_cascade import TEXT, WordEncoder, tiny_stages

from cascade.bundle import save_bundle
from cascade.text.encoders import ENCODERS


@pytest.fixture(scope="module")
def stages():
    return tiny_stages()


@pytest.fixture(scope="module")
def bundle(stages, tmp_path_factory):
    def words(*, max_length: int, weights: str):
        return WordEncoder()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "words", words)
        yield save_bundle(tmp_path_factory.mktemp("b") / "tiny", stages, TEXT, WordEncoder())
