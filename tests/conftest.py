"Settings shared by all tests: one thread, nothing from the network, quiet libraries."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    "CUDA tests skip with a reason that shows in the summary."
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def kept(monkeypatch):
    "The models that runs of the command line saved, as they were in memory."
    from llm_train_course.app import runs

    found, save = [], runs.save_trained
    monkeypatch.setattr(runs, "save_trained", lambda run, model, *rest: found.append(model) or save(run, model, *rest))
    return found
