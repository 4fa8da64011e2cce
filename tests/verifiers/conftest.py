"""Items of both verifiers, and one router and one server for all tests of the folder."""

import pytest

from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers.client import VerifierClient
from vtriune_jax.verifiers.embedded import VerifierServer
from vtriune_jax.verifiers.router import Item, Router

BOX = "[{'bbox_2d': [100, 100, 300, 300], 'label': 'dog'}]"
TIME_LIMIT = 2.0


@pytest.fixture(scope="session")
def boxes_item():
    """An item of the detection verifier: the text of the answer, then fields of item and params."""

    def make(
        answer=BOX, truth=BOX, completion=None, progress=0.0, grid=(), threshold=None, **params
    ):
        reward = RewardConfig(
            verifier="detection",
            ground_truth=f"<answer>\n{truth}\n</answer>",
            format_ratio=0.1,
            params=params,
        )
        if completion is None:
            completion = f"<think>\nlook\n</think>\n<answer>\n{answer}\n</answer>"
        return Item(completion, reward, progress, grid, threshold)

    return make


@pytest.fixture(scope="session")
def math_item():
    """An item of mathverify: what stands in the box, then the ground truth."""

    def make(answer, truth=r"\boxed{42}"):
        return Item(rf"so \boxed{{{answer}}}", RewardConfig("mathverify", truth))

    return make


@pytest.fixture(scope="session")
def router():
    router = Router(workers=2, limit=TIME_LIMIT)
    yield router
    router.close()


@pytest.fixture(scope="session")
def server():
    with VerifierServer(workers=2, limit=TIME_LIMIT) as server:
        yield server


@pytest.fixture
def client(server):
    with VerifierClient(server.addresses, backoff=0.05) as client:
        yield client
