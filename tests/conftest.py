import gc
import os

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # else a name that is no file is asked for again and again
# Two test processes of one thread each; deadlines measure the machine, not the code.
torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, derandomize=bool(os.environ.get("CI")), max_examples=100)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state in singletons, and refuses another configuration in the same process."""
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def pytest_collection_modifyitems(items):
    # The slow ones first, so that no process is left with one of them when the other has finished.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    gc.freeze()  # what was imported stays: each of the collections that trainers ask for took a second
