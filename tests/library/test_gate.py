"""The gate before a whole model: put in place and taken away exactly, beside hooks and torch.compile."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

import h2cache
from h2cache import H2Config
from tests.helpers.nunchaku_double import make_v1
from tests.helpers.plans import Loop, Toy, ToyOutput, sampler
from tests.helpers.toys import make_flux, make_inputs

STEPS, COUNT = 10, 4


def flux_loop(model: nn.Module | None = None) -> Loop:
    """A loop over FLUX as the library serves it."""

    class Flux(Loop):
        @torch.no_grad()
        def __call__(self, steps: int = STEPS) -> torch.Tensor:
            self.scheduler.set_timesteps(steps)
            given = make_inputs()
            x = given.pop("hidden_states")
            for t in self.scheduler.timesteps:
                call = given | {"timestep": t.expand(1) / 1000, "hidden_states": x}
                x = self.scheduler.step(self.transformer(**call, return_dict=False)[0], t, x).prev_sample
            return x

    return Flux(make_flux() if model is None else model, sampler("flow Euler"))


class Plain(nn.Module):
    """What compiles in no time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.eval()

    def forward(self, sample, timestep, encoder_hidden_states=None, control=None, return_dict=True):
        x = self.inner(sample).tanh() + timestep.reshape(-1, 1, 1) / 2000
        return ToyOutput(x) if return_dict else (x,)


class Plainly(Loop):
    def __init__(self) -> None:
        super().__init__(Plain(), sampler("flow Euler"))

    def __call__(self, steps: int = STEPS) -> torch.Tensor:
        return super().__call__(steps, return_dict=False)


class Count:
    """How often a module's own forward runs, wherever it is called from."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *_) -> None:
        self.calls += 1


def of(loop: Loop) -> dict:
    return dict(vars(loop.transformer))


# Enabling and disabling


def test_disabling_restores_everything(tmp_path):
    loop = flux_loop()
    before, right = of(loop), loop()
    for _ in range(2):  # nested
        h2cache.enable(loop, evaluations=COUNT)
    loop()
    h2cache.enable(loop, H2Config(tau1=0.1, tau2=0.1))
    loop()
    h2cache.enable(loop, evaluations=COUNT)
    h2cache.disable(loop)
    h2cache.disable(loop)
    assert of(loop) == before
    assert torch.equal(loop(), right)


def test_what_stood_on_the_model_itself_comes_back():
    loop = Loop(Toy(), sampler("flow Euler"))
    own, compiled = loop.transformer.cache_context, loop.transformer._call_impl
    vars(loop.transformer)["cache_context"] = own
    vars(loop.transformer)["_compiled_call_impl"] = compiled
    before = of(loop)
    h2cache.enable(loop, evaluations=COUNT)
    loop(STEPS)
    assert len(loop.transformer.calls) == COUNT
    h2cache.disable(loop)
    assert of(loop) == before


def test_a_wrapper_put_over_the_gate_is_left_alone():
    loop = h2cache.enable(Loop(Toy(), sampler("flow Euler")), evaluations=COUNT)
    later = loop.transformer.cache_context
    vars(loop.transformer)["cache_context"] = wrapper = lambda name: later(name)
    h2cache.disable(loop)
    assert vars(loop.transformer)["cache_context"] is wrapper


def test_another_methods_place_is_taken_and_given_back():
    loop = flux_loop()
    right = loop()
    h2cache.enable(loop, H2Config(tau1=0.3, tau2=0.3))
    cached = loop()
    h2cache.enable(loop, evaluations=COUNT)
    count = Count(loop.transformer)
    loop()
    assert count.calls == COUNT
    h2cache.enable(loop, H2Config(tau1=0.3, tau2=0.3))
    assert torch.equal(loop(), cached)
    h2cache.disable(loop)
    assert torch.equal(loop(), right)


def test_diffusers_own_cache_is_refused_before_and_after():
    from diffusers import FirstBlockCacheConfig

    loop = flux_loop()
    loop.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        h2cache.enable(loop, evaluations=COUNT)
    loop.transformer.disable_cache()
    h2cache.enable(loop, evaluations=COUNT)
    loop.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        loop()


def test_split_is_refused():
    with pytest.raises(ValueError, match="no stages"):
        h2cache.enable(flux_loop(), evaluations=3, split=2)


# Nothing runs, nothing is moved


def test_no_part_of_the_model_runs_on_a_skipped_step():
    loop = flux_loop()
    counts = [Count(module) for module in loop.transformer.modules() if not isinstance(module, nn.ModuleList)]
    loop()
    full = [count.calls for count in counts]
    assert full[0] == STEPS
    for count in counts:
        count.calls = 0
    h2cache.enable(loop, evaluations=COUNT)
    loop()
    assert [count.calls * STEPS for count in counts] == [calls * COUNT for calls in full]


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_offload_moves_weights_only_when_they_are_used(when):
    loop = flux_loop()
    right = loop()
    h2cache.enable(loop, evaluations=COUNT)
    cached = loop()
    h2cache.disable(loop)
    moved = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return args, kwargs

    if when == "before":
        accelerate.hooks.add_hook_to_module(loop.transformer, Hook())
        before = of(loop)
    h2cache.enable(loop, evaluations=COUNT)
    if when == "after":
        accelerate.hooks.add_hook_to_module(loop.transformer, Hook())
    assert torch.equal(loop(), cached)
    assert len(moved) == COUNT
    h2cache.disable(loop)
    if when == "before":
        assert of(loop) == before
    assert torch.equal(loop(), right)
    accelerate.hooks.remove_hook_from_module(loop.transformer)
    assert torch.equal(loop(), right)


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_cpu_offload(when):
    loop = flux_loop()
    right = loop()
    h2cache.enable(loop, evaluations=COUNT)
    cached = loop()
    if when == "before":
        h2cache.disable(loop)
    accelerate.cpu_offload(loop.transformer, execution_device=torch.device("cpu"))
    if when == "before":
        h2cache.enable(loop, evaluations=COUNT)
    assert torch.equal(loop(), cached)
    h2cache.disable(loop)
    assert torch.equal(loop(), right)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_diffusers_group_offloading(when, kind):
    loop = flux_loop()
    right = loop()
    h2cache.enable(loop, evaluations=COUNT)
    cached = loop()
    if when == "before":
        h2cache.disable(loop)
    apply_group_offloading(
        loop.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1,
    )
    if when == "before":
        h2cache.enable(loop, evaluations=COUNT)
    assert torch.equal(loop(), cached)
    h2cache.disable(loop)
    assert torch.equal(loop(), right)


# torch.compile


@pytest.fixture
def graphs():
    """A backend that counts the calls of what it compiled."""
    torch._dynamo.reset()

    def backend(graph, inputs):
        def run(*args):
            backend.calls += 1
            return graph(*args)

        return run

    backend.calls = 0
    yield backend
    torch._dynamo.reset()


def cached_by_the_plan() -> tuple[torch.Tensor, torch.Tensor]:
    loop = Plainly()
    right = loop()
    return right, h2cache.enable(loop, evaluations=COUNT)()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_in_place(graphs, when, fullgraph):
    right, cached = cached_by_the_plan()
    loop = Plainly()
    if when == "before":
        loop.transformer.compile(backend=graphs, fullgraph=fullgraph)
        before = of(loop)
    h2cache.enable(loop, evaluations=COUNT)
    if when == "after":
        loop.transformer.compile(backend=graphs, fullgraph=fullgraph)
    assert torch.allclose(loop(), cached, atol=1e-5)
    assert graphs.calls >= COUNT
    ran, graphs.calls = graphs.calls, 0
    h2cache.disable(loop)
    assert torch.allclose(loop(), right, atol=1e-5)
    assert graphs.calls == ran // COUNT * STEPS  # still compiled, and only the model
    if when == "before":
        assert of(loop) == before
    assert "compile" not in of(loop)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_wrapped_before(graphs, fullgraph):
    right, cached = cached_by_the_plan()
    loop = Plainly()
    plain = loop.transformer
    loop.transformer = torch.compile(plain, backend=graphs, fullgraph=fullgraph)
    before = of(loop)
    h2cache.enable(loop, evaluations=COUNT)
    assert torch.allclose(loop(), cached, atol=1e-5)
    assert graphs.calls >= COUNT
    assert h2cache.summary(loop).steps == STEPS
    h2cache.disable(loop)
    assert of(loop) == before
    with pytest.raises(ValueError, match="no cache is enabled"):
        h2cache.summary(plain)
    assert torch.allclose(loop(), right, atol=1e-5)


def test_wrapped_after(graphs):
    right, cached = cached_by_the_plan()
    loop = Plainly()
    h2cache.enable(loop, evaluations=COUNT)
    plain = loop.transformer
    loop.transformer = torch.compile(plain, backend=graphs)
    assert torch.allclose(loop(), cached, atol=1e-5)
    assert graphs.calls >= COUNT  # the model is compiled
    assert len(h2cache.summary(loop).evaluated) == COUNT
    h2cache.enable(loop, evaluations=COUNT)  # anew, around the wrapper: not both
    with pytest.raises(ValueError, match="no cache is enabled"):
        h2cache.summary(plain)
    assert torch.allclose(loop(), cached, atol=1e-5)
    h2cache.disable(loop)
    assert torch.allclose(loop(), right, atol=1e-5)


def test_wrapped_after_as_one_graph_is_refused_with_what_to_do(graphs):
    right, cached = cached_by_the_plan()
    loop = Plainly()
    h2cache.enable(loop, evaluations=COUNT)
    loop.transformer = torch.compile(loop.transformer, backend=graphs, fullgraph=True)
    if hasattr(loop.transformer.dynamo_ctx, "fullgraph"):
        with pytest.raises(ValueError, match=r"compile first and call h2cache\.enable then"):
            loop()
    else:  # torch 2.7 does not trace what stands before the model
        assert torch.allclose(loop(), cached, atol=1e-5)
    h2cache.disable(loop)
    assert torch.allclose(loop(), right, atol=1e-5)
    h2cache.enable(loop, evaluations=COUNT)
    assert torch.allclose(loop(), cached, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.8", reason="cannot trace diffusers' attention as one graph")
def test_compiled_blocks_beneath_the_gate(graphs):
    cached = h2cache.enable(flux_loop(make_flux(1, 1)), evaluations=COUNT)()
    loop = flux_loop(make_flux(1, 1))
    loop.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    h2cache.enable(loop, evaluations=COUNT)
    assert torch.allclose(loop(), cached, atol=1e-5)


def test_a_block_method_is_still_refused_on_a_model_compiled_as_a_whole(graphs):
    loop = flux_loop(make_flux(1, 1))
    loop.transformer.compile(backend=graphs)
    h2cache.enable(loop, evaluations=COUNT)
    with pytest.raises(ValueError, match="compiled as a whole"):
        h2cache.enable(loop, H2Config())
    loop()
    assert len(h2cache.summary(loop).evaluated) == COUNT  # the plan is still on


# nunchaku


def test_nunchaku_v1_is_answered_for_through_its_one_call():
    loop = flux_loop(make_v1())
    handle = loop.transformer.transformer_blocks[0].m
    right = loop()
    assert handle.calls["forward"] == STEPS
    before = of(loop)
    for count in (STEPS, COUNT):
        handle.calls.clear()
        h2cache.enable(loop, evaluations=count)
        drawn = loop()
        assert handle.calls == {"forward": count}
        assert torch.equal(drawn, right) == (count == STEPS)
    h2cache.disable(loop)
    assert of(loop) == before
    assert torch.equal(loop(), right)
