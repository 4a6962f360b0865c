"""nunchaku's real Python classes for tests, over an emulated compiled module; skipped without them.

    NUNCHAKU_EMULATION=../shared/nunchaku_emulation NUNCHAKU_SRC=FOLDER_OF_NUNCHAKU_SOURCES \
    H2CACHE_AUTHORS_SRC=CHECKOUT_OF_THE_AUTHORS_CODE \
    python -m pytest tests/engines/test_nunchaku_real.py tests/engines/test_nunchaku_decisions.py

The emulation turns CUDA devices into the CPU for the whole process: run these files alone (6 minutes). With
the real wheel only the signatures are compared, since it takes full-size checkpoints only: on its GPU,
`python -m analysis.bench_step --engine nunchaku` checks the same equality.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

EMULATION, AUTHORS = os.environ.get("NUNCHAKU_EMULATION"), os.environ.get("H2CACHE_AUTHORS_SRC")

emulated = pytest.mark.skipif(not EMULATION, reason="needs NUNCHAKU_EMULATION and nunchaku's sources")
with_authors = pytest.mark.skipif(not AUTHORS, reason="needs H2CACHE_AUTHORS_SRC, the authors' code")


@pytest.fixture(scope="session")
def nunchaku():
    """The real package, over its own compiled module or an emulated one."""
    if EMULATION:
        sys.path.insert(0, str(Path(EMULATION).resolve()))
        import make_env

        return make_env.setup()
    pytest.importorskip("nunchaku._C", reason="nunchaku is not installed, and NUNCHAKU_EMULATION is not set")
    return importlib.import_module("nunchaku")


@pytest.fixture(scope="session", params=["int4", "fp4"])
def checkpoint(nunchaku, request, tmp_path_factory):
    import make_env

    make_env.setup((8, 9) if request.param == "int4" else (12, 0))
    folder = tmp_path_factory.mktemp(request.param)
    return make_env.tiny_checkpoint(layers=3, singles=5, precision=request.param, folder=folder)[1]


def denoise(model, steps: int = 5, batch: int = 1, extra: dict | None = None) -> list[Any]:
    """Forward calls at falling timesteps with slowly changing inputs and one prompt."""
    import make_env
    import torch

    outputs, text = [], None
    for n in range(steps):
        inputs = make_env.inputs(model.config, t=1 - n / steps, batch=batch)
        text = inputs["encoder_hidden_states"] if text is None else text
        inputs["encoder_hidden_states"] = text
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(model(**inputs, **(extra or {}), return_dict=False)[0])
    return outputs


def draw(model, steps: int = 20, size: int = 256) -> Any:
    """Latents of a run of a FluxPipeline."""
    import make_env

    return make_env.run_pipeline(make_env.tiny_pipeline(model), steps=steps, size=size)


def assert_equal(expected, outputs) -> None:
    import torch

    assert len(expected) == len(outputs)
    for a, b in zip(expected, outputs, strict=True):
        assert torch.equal(a, b)
