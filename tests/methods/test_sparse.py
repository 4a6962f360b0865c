"""Chipmunk's column sparsity: exact where it must be, and consistent under methods that skip blocks."""

import pytest
import torch
from torch.nn import functional as F

import h2cache
from h2cache import H2Config, find_method
from h2cache.sparse import Attention, Mlp, SparseConfig, dense, neighbours, sparse
from tests.helpers.toys import denoise, generate, make_flux, make_inputs

SMALL = {"queries": 16, "tokens": 12, "multiple": 4}  # neither divides the number of tokens
STEPS = 14


def grid(side: int = 8) -> torch.Tensor:
    rows = torch.arange(side * side)
    return torch.stack([torch.zeros(side * side), rows // side, rows % side], dim=1)


def inputs(batch: int = 1, **settings) -> dict:
    return make_inputs(batch, tokens=64, **settings) | {"img_ids": grid()}


def furthest(a: list, b: list) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def model():
    return make_flux(4, 5)


@pytest.fixture
def plain(model):
    yield denoise(model, STEPS, inputs=inputs())
    h2cache.disable(model)
    dense(model)


def test_all_columns_are_the_dense_model(model, plain):
    sparse(model, SparseConfig(full_every=1, **SMALL))
    assert furthest(plain, denoise(model, STEPS, inputs=inputs())) == 0
    sparse(model, SparseConfig(keep_keys=1, keep_neurons=1, random=0, **SMALL))
    assert furthest(plain, denoise(model, STEPS, inputs=inputs())) < 3e-6


def test_few_columns_are_near_and_a_full_step_is_nearer(model, plain):
    sparse(model, SparseConfig(**SMALL))
    few = denoise(model, STEPS, inputs=inputs())
    assert furthest(plain[:1], few[:1]) < 3e-6
    assert 1e-3 < furthest(plain, few) < 0.2
    assert furthest(few, denoise(model, STEPS, inputs=inputs())) == 0  # the second request begins afresh


def test_it_is_undone_exactly(model, plain):
    before = [dict(vars(module)) for module in model.modules()]
    sparse(model, SparseConfig(**SMALL))
    sparse(model, SparseConfig(**SMALL))
    dense(model)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert furthest(plain, denoise(model, STEPS, inputs=inputs())) == 0


@pytest.mark.parametrize("tokens", [7, 40, 64])
def test_where_nothing_changes_a_sparse_step_gives_what_the_full_one_gave(tokens):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, tokens, 8).unbind()
    attention = Attention(SparseConfig(keep_keys=0.05, **SMALL))
    whole = F.scaled_dot_product_attention(q, k, v)
    for _ in range(5):
        torch.testing.assert_close(attention(lambda: whole, q, k, v), whole)
    assert attention.keys.shape[-1] == 4  # one multiple at least
    x, up, down = torch.randn(2, tokens, 8), torch.nn.Linear(8, 40), torch.randn(8, 40)
    mlp, hidden = Mlp(SparseConfig(**SMALL), 0), F.gelu(up(x))
    assert mlp.full()
    mlp.learn(x, hidden, up, down)
    for _ in range(4):
        assert not mlp.full()
        torch.testing.assert_close(mlp.update(x, up, F.gelu, down), hidden @ down.T, rtol=1e-4, atol=1e-4)


def test_an_mlp_computes_the_neurons_whose_input_moved():
    """One neuron alone moves, and is among those chosen: the sparse step is exact."""
    torch.manual_seed(0)
    up, down = torch.nn.Linear(8, 40), torch.randn(8, 40)
    x = torch.randn(1, 24, 8)
    with torch.no_grad():
        up.weight[:39] = 0.0  # these do not see the input
        up.weight[39] = 1.0
    mlp = Mlp(SparseConfig(keep_neurons=0.03, random=0, **SMALL), 0)
    mlp.full()
    mlp.learn(x, F.gelu(up(x)), up, down)
    mlp.full()
    moved = x + 0.5
    torch.testing.assert_close(mlp.update(moved, up, F.gelu, down), F.gelu(up(moved)) @ down.T)


def test_neighbours_follow_each_other_and_the_picture_is_the_same():
    order = neighbours(grid(16), 256)
    assert sorted(order.tolist()) == [*range(256)]
    first = order[:16]
    assert {(int(n) // 16, int(n) % 16) for n in first} == {(r, c) for r in range(4) for c in range(4)}
    second = order[64:128]  # the next 8 x 8
    assert {int(n) // 16 for n in second} == {*range(8)}
    assert {int(n) % 16 for n in second} == {*range(8, 16)}
    assert neighbours(grid(6), 36) is None


def test_an_image_in_a_batch_and_a_branch_come_out_as_alone(model, plain):
    sparse(model, SparseConfig(**SMALL))
    both = inputs(2, seed=3)
    whole = denoise(model, STEPS, inputs=both)
    for n in range(2):
        own = {k: v if k.endswith("ids") else v[n : n + 1] for k, v in both.items()}
        alone = denoise(model, STEPS, inputs=own)
        assert furthest([w[n : n + 1] for w in whole], alone) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        H2Config(tau1=0.5, tau2=0.5, max_consecutive_hits=2),
        find_method("hicache")(interval=3, granularity="stage"),
        find_method("hicache")(interval=3),
        h2cache.PlanConfig(speedup=2.0),
    ],
    ids=["h2cache", "hicache of stages", "hicache", "plan"],
)
def test_methods_lie_on_top(tiny, config):
    """With all columns the picture is that of the method alone: a skipped module keeps its base."""
    call = {"steps": 12, "height": 128, "width": 128}
    h2cache.enable(tiny, config)
    expected = generate(tiny, **call)
    h2cache.disable(tiny)
    for settings, limit in (({"keep_keys": 1, "keep_neurons": 1, "random": 0}, 1e-3), ({}, 0.5)):
        sparse(tiny, SparseConfig(full_every=5, **SMALL, **settings))
        h2cache.enable(tiny, config)
        both = generate(tiny, **call)
        assert (both - expected).norm() <= limit * expected.norm()
        assert h2cache.summary(tiny).blocks_run < h2cache.summary(tiny).blocks
        h2cache.disable(tiny)
        dense(tiny)


def test_a_method_of_modules_must_come_after_it(model, plain):
    h2cache.enable(model, find_method("hicache")())
    with pytest.raises(ValueError, match="enabled on top"):
        sparse(model, SparseConfig(**SMALL))
    h2cache.disable(model)
    sparse(model, SparseConfig(**SMALL))
    h2cache.enable(model, find_method("hicache")())
    with pytest.raises(ValueError, match="a method that answers for modules"):
        dense(model)
    h2cache.disable(model)
    dense(model)
    assert furthest(plain, denoise(model, STEPS, inputs=inputs())) == 0


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"keep_keys": 0}, "keep_keys=0"),
        ({"random": 1}, "random=1"),
        ({"full_every": 0}, "full_every=0"),
        ({"tokens": 0}, "tokens=0"),
    ],
)
def test_wrong_settings_are_named(settings, what):
    with pytest.raises(ValueError, match=what):
        SparseConfig(**settings)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="is for FluxTransformer2DModel, not Linear"):
        sparse(torch.nn.Linear(1, 1))
