"""The fake server keeps the contract, and so does the real one (marker `sglang`)."""

import pytest

from tests.rollout import contract
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.made_up import END, PAD, START, VOCAB


@pytest.fixture(scope="module")
def fake(made_up_folders):
    first, second = made_up_folders
    with FakeServer(model_path=first, token_seconds=0.005, no_vision_cache=True) as server:
        yield contract.Peer(server.address, first, second, PAD, START, END, VOCAB)


@pytest.fixture(scope="module")
def real(real_server, served_versions):
    first, second = served_versions
    config = first.config
    return contract.Peer(
        real_server.addresses[0],
        first.folder,
        second.folder,
        config.image_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
        config.text.vocab,
    )


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_fake(check, fake):
    check(fake)


@pytest.mark.sglang
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_real(check, real):
    check(real)
