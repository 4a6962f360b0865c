"""What any test may ask for."""

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import h2cache
from analysis.drawing.draw import load_pipeline
from tests.helpers.nunchaku_env import checkpoint, nunchaku  # noqa: F401  fixtures
from tests.helpers.toys import TINY, make_flux

torch.set_num_threads(1)  # two threads starve each other on a busy machine


def pytest_collection_finish() -> None:
    """What is loaded by now stays: no collection of garbage need look through a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def flux() -> FluxTransformer2DModel:
    return make_flux()


@pytest.fixture(scope="session")
def _tiny_pipeline() -> FluxPipeline:
    pipeline = load_pipeline(TINY, "cpu", None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny(_tiny_pipeline) -> Iterator[FluxPipeline]:
    """The embedded model; components are shared, the pipeline and its scheduler are the test's own."""
    parts = dict(_tiny_pipeline.components, scheduler=copy.deepcopy(_tiny_pipeline.scheduler))
    pipeline = FluxPipeline(
        **{k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
    )
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    h2cache.disable(pipeline)
