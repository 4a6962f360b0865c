"""The plan in requests of every kind: branches, changes in mid-run, outputs of every form, memory."""

import copy
import gc
import threading
import warnings

import pytest
import torch

import h2cache
from h2cache.memory import Request
from h2cache.plan import HELD, PlanConfig
from tests.helpers.plans import Loop, Toy, ToyOutput, sampler
from tests.helpers.toys import make_flux, make_inputs

TEXT = torch.arange(9.0).reshape(1, 3, 3)


@pytest.fixture
def pipe() -> Loop:
    return Loop(Toy(), sampler("flow Euler"))


def calls(pipe: Loop, *args, **kwargs) -> int:
    """How often a call of `pipe` runs its model."""
    pipe.transformer.calls.clear()
    pipe(*args, **kwargs)
    return len(pipe.transformer.calls)


def held(pipe: Loop) -> int:
    """Bytes that are kept at this moment, of whatever request."""
    return h2cache.summary(pipe).bytes_of_all


# How many


def test_speedup_divides_the_evaluations(pipe):
    for speedup, count in ((1, 20), (2, 10), (3, 7), (5, 4), (100, 1)):
        assert calls(h2cache.enable(pipe, speedup=speedup), 20) == count
    for steps in (10, 50):
        assert calls(h2cache.enable(pipe, speedup=5), steps) == steps // 5


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_speedup_of_few_steps_runs_uncached_and_says_so(pipe, steps):
    right = pipe(steps)
    h2cache.enable(pipe, speedup=5)
    with pytest.warns(UserWarning, match="too few steps"):
        assert torch.equal(pipe(steps), right)
    assert "too few steps" in h2cache.summary(pipe).warning


def test_steps_of_the_users_own_are_evaluated(pipe):
    h2cache.enable(pipe, PlanConfig(steps=(0, 1, 5, 30)))
    assert calls(pipe, 20) == 3
    assert h2cache.summary(pipe).evaluated == (0, 1, 5)


# Branches


@pytest.mark.parametrize("names", [("cond", "uncond"), (None, None)])
def test_both_branches_have_their_own_outputs(pipe, names):
    right = pipe(20, text=TEXT, branches=names)
    assert calls(h2cache.enable(pipe, evaluations=20), 20, text=TEXT, branches=names) == 40
    h2cache.enable(pipe, evaluations=6)
    assert calls(pipe, 20, text=TEXT, branches=names) == 12
    assert len(h2cache.summary(pipe).branches) == 2
    assert (pipe(20, text=TEXT, branches=names) - right).norm() < 0.05 * right.norm()


def test_a_branch_that_begins_late_is_evaluated_where_it_begins(pipe):
    def late(step, branch):
        return branch == "cond" or step >= 7

    h2cache.enable(pipe, evaluations=6)
    pipe(20, text=TEXT, branches=("cond", "uncond"), when=late)
    records = h2cache.step_records(pipe)
    first = next(r for r in records if r.branch == "uncond")
    assert (first.step, first.outcome) == (7, "miss")
    assert sum(r.outcome == "miss" for r in records if r.branch == "cond") == 6
    assert sum(r.outcome == "miss" for r in records if r.branch == "uncond") <= 6


def test_a_branch_that_stops_is_freed_with_the_other(pipe):
    h2cache.enable(pipe, evaluations=6)
    pipe(20, text=TEXT, branches=("cond", "uncond"), when=lambda step, name: name == "cond" or step < 9)
    assert held(pipe) == 0
    assert sum(r.branch == "uncond" for r in h2cache.step_records(pipe)) == 9


@pytest.mark.parametrize("away", [range(3, 12), range(1, 19), range(5, 7)])
def test_a_branch_that_pauses_never_rests_on_outputs_it_lacks(pipe, away):
    h2cache.enable(pipe, evaluations=8)
    drawn = pipe(20, text=TEXT, branches=("cond", "uncond"), when=lambda s, n: n == "cond" or s not in away)
    assert torch.isfinite(drawn).all()
    records = [r for r in h2cache.step_records(pipe) if r.branch == "cond"]
    assert sum(r.outcome == "miss" for r in records) == 8


def test_guidance_that_ends_changes_the_batch_and_starts_afresh(pipe):
    """Both in one batch, as SD3 has it, until guidance ends."""
    model, scheduler = pipe.transformer, pipe.scheduler

    class Batched(Loop):
        def __call__(self, steps):
            scheduler.set_timesteps(steps)
            x = torch.ones(1, 6, 4)
            for i, t in enumerate(scheduler.timesteps):
                both = torch.cat([x, x]) if i < 8 else x
                with torch.no_grad():
                    out = self.transformer(both, t.expand(len(both)), return_dict=False)[0]
                assert out.shape == both.shape
                x = scheduler.step(out[:1], t, x).prev_sample
            return x

    batched = h2cache.enable(Batched(model, scheduler), evaluations=5)
    batched(20)
    outcomes = {r.step: r.outcome for r in h2cache.step_records(batched)}
    assert outcomes[8] == "miss"
    assert list(outcomes.values()).count("miss") in (5, 6)


# Forms of the output


def test_a_skipped_step_gives_the_models_own_class(pipe):
    pipe.transformer.further = True
    h2cache.enable(pipe, evaluations=4)
    pipe(12)
    assert all(type(out) is ToyOutput for out in pipe.outputs)
    assert all(len(out.further) == 2 and out.note == "from the model" for out in pipe.outputs)
    for out in pipe.outputs:  # what depends on the sample linearly is forecast alike
        assert torch.allclose(out.further[0], out.sample * 2, atol=1e-5)
    pipe(12, return_dict=False)
    assert all(type(out) is tuple and len(out) == 1 for out in pipe.outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_models_own_dtype(pipe, dtype):
    pipe.transformer.to(dtype)
    latents = torch.randn(1, 6, 4, dtype=dtype)
    h2cache.enable(pipe, evaluations=4)
    own = pipe.transformer.forward
    vars(pipe.transformer)["forward"] = lambda *a, **k: (own(*a, **k).sample.to(dtype),)
    pipe.scheduler.set_timesteps(8)
    for t in pipe.scheduler.timesteps:
        out = call_in(pipe, latents, t)
        assert out.dtype == dtype


def call_in(pipe: Loop, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """One step of a pipeline, whose frame has it as `self`."""

    def step(self):
        out = self.transformer(latents, t.expand(1))[0]
        self.scheduler.step(out, t, latents)
        return out

    with torch.no_grad():
        return step(pipe)


def test_edits_of_what_was_given_do_not_reach_what_is_kept(pipe):
    h2cache.enable(pipe, evaluations=5)
    right = [out.sample.clone() for out in (pipe(12), pipe.outputs)[1]]

    class Careless(Toy):
        """Gives the same memory at each call, as CUDA graphs do."""

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            self.memory = getattr(self, "memory", torch.empty_like(out.sample)).copy_(out.sample)
            return ToyOutput(self.memory)

    careless = h2cache.enable(Loop(Careless(), sampler("flow Euler")), evaluations=5)
    seen = []

    def edit(loop, step, given):
        seen.append(loop.outputs[-1].sample.clone())
        loop.outputs[-1].sample.mul_(1e3)

    careless(12, callback=edit)
    assert all(torch.equal(a, b) for a, b in zip(seen, right, strict=True))


# What changes in mid-run


def test_another_prompt_in_mid_run_starts_afresh(pipe):
    def switch(loop, step, given):
        if step == 6:
            given["texts"][None] = TEXT + 1

    h2cache.enable(pipe, evaluations=5)
    pipe(20, text=TEXT, callback=switch)
    records = h2cache.step_records(pipe)
    assert len(records) == 20
    assert records[7].outcome == "miss"
    assert sum(r.outcome == "miss" for r in records) in (5, 6)


def test_latents_edited_in_mid_run_are_followed_from_the_next_evaluation(pipe):
    def edit(loop, step, given):
        if step == 6:
            given["latents"] = given["latents"] * 1.2

    right = pipe(40, callback=edit)
    h2cache.enable(pipe, evaluations=12)
    assert calls(pipe, 40, callback=edit) == 12
    followed = (pipe(40, callback=edit) - right).norm()
    assert followed < 0.05 * right.norm()

    def edit_and_say_so(loop, step, given):
        edit(loop, step, given)
        if step == 6:
            h2cache.restart(loop)

    assert calls(pipe, 40, callback=edit_and_say_so) in (12, 13)
    assert h2cache.step_records(pipe)[7].outcome == "miss"
    assert (pipe(40, callback=edit_and_say_so) - right).norm() < followed


@pytest.mark.parametrize(
    "keep", [[1.0] * 7 + [0.0] * 13, [0.0] * 4 + [1.0] * 16, [0.0] * 3 + [1.0] * 9 + [0.0] * 8]
)
def test_a_controlnet_that_is_switched_is_met_by_an_evaluation(pipe, keep):
    h2cache.enable(pipe, evaluations=6)
    pipe(20, controlnet_keep=keep)
    outcomes = [r.outcome for r in h2cache.step_records(pipe)]
    assert outcomes.count("miss") == 6  # they are in the plan
    for step in range(1, 20):
        if keep[step] != keep[step - 1]:
            assert outcomes[step] == "miss"
            after = pipe.outputs[step + 1] if outcomes[step + 1] == "hit" else pipe.outputs[step]
            assert torch.equal(after.sample, pipe.outputs[step].sample)  # nothing of before is in it


def test_an_interrupted_call_leaves_nothing_behind(pipe):
    h2cache.enable(pipe, evaluations=5)
    right = pipe(12, text=TEXT)

    def stop(loop, step, given):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(12, text=TEXT, callback=stop, seed=1)
    assert torch.equal(pipe(12, text=TEXT), right)

    own, pipe.transformer.text = pipe.transformer.text, None
    with pytest.raises(TypeError):
        pipe(12, text=TEXT, seed=1)
    assert held(pipe) == 0
    pipe.transformer.text = own
    assert torch.equal(pipe(12, text=TEXT), right)


def test_sizes_batches_and_step_counts_in_a_row(pipe):
    requests = [(20, (1, 6, 4)), (20, (1, 9, 4)), (13, (3, 9, 4)), (20, (1, 6, 4)), (5, (1, 6, 4))]

    def draw(steps, shape):
        return pipe(steps, latents=torch.randn(shape, generator=torch.Generator().manual_seed(1)))

    alone = []
    for request in requests:
        h2cache.enable(pipe, evaluations=4)
        alone.append(draw(*request))
    h2cache.enable(pipe, evaluations=4)
    assert all(torch.equal(draw(*request), out) for request, out in zip(requests, alone, strict=True))


def test_an_image_in_a_batch_equals_the_image_alone(pipe):
    latents = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    h2cache.enable(pipe, evaluations=5)
    together = pipe(16, latents=latents)
    for n in range(3):
        assert torch.allclose(pipe(16, latents=latents[n : n + 1])[0], together[n], atol=1e-6)


# Threads and pipelines


def test_two_pipelines_share_a_model_in_two_threads(pipe):
    other = Loop(pipe.transformer, copy.deepcopy(pipe.scheduler))
    h2cache.enable(pipe, evaluations=5)
    right = pipe(20, text=TEXT), other(9, text=TEXT * 2)
    turn = threading.Barrier(2, timeout=20)
    drawn = {}

    def meet(loop, step, given):
        if step < 8:
            turn.wait()

    def run(name, loop, steps, text):
        drawn[name] = loop(steps, text=text, callback=meet)

    threads = [
        threading.Thread(target=run, args=(0, pipe, 20, TEXT)),
        threading.Thread(target=run, args=(1, other, 9, TEXT * 2)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(drawn[0], right[0])
    assert torch.equal(drawn[1], right[1])


# Memory


@pytest.mark.parametrize("names", [("cond",), ("cond", "uncond")])
def test_three_outputs_a_branch_to_the_byte_and_freed_at_the_end(pipe, names):
    h2cache.enable(pipe, evaluations=8)
    most = []
    pipe(20, text=TEXT, branches=names, callback=lambda loop, step, given: most.append(held(loop)))
    expected = HELD * 6 * 4 * 4 * len(names)  # tokens, channels, bytes
    summary = h2cache.summary(pipe)
    assert max(most) == summary.bytes_held == summary.bytes_needed == expected
    assert held(pipe) == 0
    gc.collect()
    assert sum(r.bytes_held for r in gc.get_objects() if type(r) is Request) == 0


def test_too_little_room_is_said_before_anything_is_kept(pipe, monkeypatch):
    monkeypatch.setattr(h2cache.gate, "free_bytes", lambda device: 100)
    h2cache.enable(pipe, evaluations=3)
    with pytest.raises(MemoryError, match="plan keeps"):
        pipe(12)
    assert held(pipe) == 0


# No wait


@pytest.mark.parametrize("name", ["flow Euler", "flow UniPC", "flow Heun", "Euler", "DDIM", "PNDM", "DDPM"])
def test_nothing_waits_for_the_device_after_the_first_step(name, monkeypatch):
    """Whatever brings a number to the host is counted while the gate is at work."""
    pipe = h2cache.enable(Loop(Toy(), sampler(name)), evaluations=5)
    gate, reads, inside = vars(pipe.transformer)["_compiled_call_impl"], [], []

    def counting(own):
        def read(*args, **kwargs):
            inside.append(own)
            return own(*args, **kwargs)

        return read

    def watched(*args, **kwargs):
        inside.clear()
        out = gate(*args, **kwargs)
        reads.append(len(inside))
        return out

    vars(pipe.transformer)["_compiled_call_impl"] = watched
    for how in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, how, counting(getattr(torch.Tensor, how)))
    pipe(12)
    assert len(reads) == len(pipe.scheduler.timesteps)
    assert sum(reads[1:]) == 0


# Bare models


def test_a_bare_model_without_a_scheduler_is_told_what_to_do():
    model = h2cache.enable(make_flux(), evaluations=3)
    with pytest.raises(RuntimeError, match="enable it on the pipeline"), torch.no_grad():
        model(**make_inputs())
    h2cache.disable(model)
    with torch.no_grad():
        model(**make_inputs())


def test_a_bare_model_is_known_by_the_pipeline_that_runs_it(pipe):
    h2cache.enable(pipe.transformer, evaluations=4)
    assert calls(pipe, 15) == 4


def test_gradients_are_refused(pipe):
    h2cache.enable(pipe, evaluations=4)
    pipe.scheduler.set_timesteps(8)
    with pytest.raises(RuntimeError, match="gradients"):
        pipe.transformer(torch.ones(1, 6, 4), pipe.scheduler.timesteps[0].expand(1))
    pipe.transformer.train()
    with pytest.raises(RuntimeError, match="for inference"):
        pipe(8)


def test_nothing_is_warned_of_where_nothing_is_wrong(pipe):
    h2cache.enable(pipe, speedup=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(20)
