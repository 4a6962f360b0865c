"""The contract on the trained models that ship beside FLUX: a DiT with DDIM, a Wan with UniPC."""

import pytest
import torch

import h2cache
from h2cache import method_names
from h2cache.plan import PlanConfig
from tests.helpers.families import STEPS, TRAINED, call_of, refused_by, trained
from tests.methods.test_contract import switched_off

LIKE = {"tiny_dit": "dit", "tiny_wan": "wan22"}  # the random model of its class, whose refusals are its own
PAIRS = [
    (model, method) for model in TRAINED for method in method_names() if method not in refused_by(LIKE[model])
]


@pytest.fixture
def case(request):
    case = trained(request.param)
    yield case
    h2cache.disable(case.target)


@pytest.mark.parametrize(("case", "method"), PAIRS, indirect=["case"])
def test_a_method_that_skips_nothing_changes_nothing(case, method):
    h2cache.enable(case.target, switched_off(method))
    assert all(map(torch.equal, case.run(), case.uncached()))


@pytest.mark.parametrize("case", TRAINED, indirect=True)
@pytest.mark.parametrize("evaluations", [1, 2, 3, STEPS])
def test_the_plan_evaluates_as_often_as_asked(case, evaluations):
    h2cache.enable(case.target, PlanConfig(evaluations=evaluations))
    drawn = case.run()
    found = h2cache.summary(case.target)
    assert found.blocks_run == evaluations * case.branches * sum(case.stage_sizes)
    assert all(map(torch.equal, drawn, case.uncached())) == (evaluations == STEPS)


@pytest.mark.parametrize("model", TRAINED)
def test_the_plan_is_nearer_than_fewer_steps(model):
    """On tiny_wan a line that is always followed in full is not."""
    pipe, call = trained(model).target, call_of(model)
    right, evaluations = final(pipe, call), 10
    fewer = final(pipe, call | {"num_inference_steps": evaluations})
    h2cache.enable(pipe, PlanConfig(evaluations=evaluations, file="none"))
    planned = final(pipe, call)
    h2cache.disable(pipe)
    assert (planned - right).norm() < (fewer - right).norm()


def final(pipe, call: dict) -> torch.Tensor:
    """What a call of a pipeline draws, as numbers."""
    output = pipe(**call, generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(output[0])
