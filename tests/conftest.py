"What every test starts from: one thread of torch, as learners are fastest and most repeatable with, and denormals as they come."

import gc

import pytest
import torch


def pytest_collection_finish():
    "What is there before the first test is not looked through again by each collection of garbage: it is much, and stays"
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    yield
    torch.set_num_threads(before)
