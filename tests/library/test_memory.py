"""The position of a step is read together with its decision where the timestep lives on an accelerator."""

import pytest
import torch

from h2cache.memory import Memory, Request
from h2cache.predictors import LastResidual
from h2cache.program import Stream
from tests.helpers.elsewhere import Elsewhere, elsewhere


@pytest.fixture
def memory() -> Memory:
    request = Request(None, 10, "test")
    made = request.memories["cond"] = Memory(request, "cond", batch=1)
    request.signatures["cond"], request.texts["cond"] = (), None
    Elsewhere.reads = 0
    return made


def decide(memory: Memory, timestep: float, features: torch.Tensor) -> list[float] | None:
    """One step with one decision, as a method makes it."""
    memory.begin_step(elsewhere(timestep), ())
    slot = memory.slot("structure", LastResidual)
    change = slot.compare(features)
    slot.refer(features, kept=[False])
    slot.predictor.learn(Stream(features), kept=[False])
    return change


def test_one_read_a_step(memory):
    features = torch.ones(1, 4, 2)
    assert decide(memory, 1.0, features) is None
    for n in range(1, 4):
        Elsewhere.reads = 0
        assert decide(memory, 1.0 - n / 10, features * (1 + n)) == pytest.approx([1 / n])
        assert memory.step == n  # known by now
        assert Elsewhere.reads == 1


def test_a_timestep_that_went_up_shows_in_the_read_and_forgets(memory):
    features = torch.ones(1, 4, 2)
    decide(memory, 1.0, features)
    decide(memory, 0.9, features)
    assert decide(memory, 1.0, features) is None  # nothing to compare with: another request
    assert memory.step == 0
    assert decide(memory, 0.9, features) == [0.0]
    assert memory.step == 1


def test_who_asks_for_the_step_first_gets_the_right_one(memory):
    features = torch.ones(1, 4, 2)
    for timestep in (1.0, 0.9, 0.8):
        decide(memory, timestep, features)
    memory.begin_step(elsewhere(1.0), ())
    assert memory.in_warmup(1)
    assert memory.slot("structure", LastResidual).reference is None
