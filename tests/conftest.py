"""What any test may ask for.

Nothing of weight is imported at the top: the process that only hands out the tests would load it too.
"""

import copy
import gc

import pytest

from tests.helpers.nunchaku_env import checkpoint, nunchaku  # noqa: F401  fixtures

LONG = ("test_parallel", "test_gpu_report", "test_devices", "test_processes")  # seconds in one piece


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first: at the end no process waits for one that another has just begun."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def pytest_collection_finish() -> None:
    """Everything is loaded by now; no collection of garbage need look through its million objects again."""
    import torch

    torch.set_num_threads(1)  # two threads starve each other on a busy machine
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip a test of a model family that the installed diffusers has not: the oldest one lacks some."""
    try:
        return (yield)
    except ImportError as error:
        if type(error).__name__ != "MissingFamily":
            raise
        pytest.skip(str(error))


pytest_runtest_setup = pytest_runtest_call  # a fixture may make it


@pytest.fixture
def flux():
    """A FLUX transformer of random weights."""
    from tests.helpers.toys import make_flux

    return make_flux()


@pytest.fixture(scope="session")
def _tiny_pipeline():
    from analysis.drawing.draw import load_pipeline
    from tests.helpers.toys import TINY

    pipeline = load_pipeline(TINY, "cpu", None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny(_tiny_pipeline):
    """The embedded model; components are shared, the pipeline and its scheduler are the test's own."""
    import h2cache

    parts = dict(_tiny_pipeline.components, scheduler=copy.deepcopy(_tiny_pipeline.scheduler))
    del parts["image_encoder"], parts["feature_extractor"]
    pipeline = type(_tiny_pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    h2cache.disable(pipeline)
