"""Tuned plans: found by measuring, kept in a file, found again by model, sampler and number of steps."""

import json
import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import h2cache
from analysis.drawing.draw import load_pipeline
from analysis.tiny_families import FAMILIES
from h2cache import PlanConfig, tuned, tuning
from h2cache.expected import Estimate, Gap
from h2cache.tuned import Quality, Tuned, TunedPlan

CALL = {"height": 16, "width": 16, "max_sequence_length": 64, "num_inference_steps": 10}
PROMPTS = [
    {"prompt": 'a red round sign that says "CAFE" on a striped green background', "seed": 3},
    {"prompt": 'a blue oval badge that says "OPEN" on a dotted pink background', "seed": 4},
]
OTHER = [{"prompt": 'a black square sign that says "GO" on a white background', "seed": 5}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the plans of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")


def draw(pipe, **further):
    given = {k: v for k, v in PROMPTS[0].items() if k != "seed"} | CALL | {"output_type": "latent"} | further
    return pipe(**given, generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> FluxPipeline:
    """FLUX of random weights, in a folder that it can be known by: a search draws hundreds of pictures."""
    folder = tmp_path_factory.mktemp("flux")
    FAMILIES["flux"]()[0].save_pretrained(folder)
    pipeline = load_pipeline(str(folder), "cpu", None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def _off(tiny) -> Iterator[None]:
    yield
    h2cache.disable(tiny)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, tiny):
    """One search, and the folder that it left its plans in."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(tuned, "SHIPPED", folder / "shipped")
        found = h2cache.tune(tiny, PROMPTS, held_out=OTHER, speedups=(2, 3.3), progress=False, **CALL)
    h2cache.disable(tiny)
    return found, folder


@pytest.fixture
def found(searched, tmp_path):
    found, folder = searched
    shutil.copytree(folder, tmp_path / "cache", dirs_exist_ok=True)
    return found


def test_a_search_never_ends_below_its_start(tiny, found):
    studio = tuning.Studio(tiny, PROMPTS, CALL, 0)
    for plan in found.plans:
        both = (
            PlanConfig(steps=plan.steps, trust=plan.trust),
            PlanConfig(evaluations=plan.evaluations, file="none"),
        )
        best, start = (sum(studio.fidelity(n, config) for n in (0, 1)) for config in both)
        assert best >= start
        assert plan.held_out.pictures == 1
    assert [plan.evaluations for plan in found.plans] == [3, 5]


def test_a_search_with_one_trial_keeps_the_default_grid(tiny, tmp_path):
    found = h2cache.tune(
        tiny, PROMPTS[:1], speedups=(2,), trials=1, save=tmp_path / "one.json", progress=False, **CALL
    )
    h2cache.enable(tiny, PlanConfig(speedup=2, file="none"))
    draw(tiny)
    assert found.plans[0].steps == h2cache.summary(tiny).evaluated
    assert found.plans[0].trust is None


def test_a_plan_is_found_again_by_its_speed(tiny, found):
    plan = found.plan(5)
    h2cache.enable(tiny, speedup=2)
    draw(tiny)
    assert h2cache.summary(tiny).evaluated == plan.steps
    h2cache.enable(tiny, PlanConfig(speedup=2, file="none"))
    draw(tiny)
    assert len(h2cache.summary(tiny).evaluated) == 5


def test_a_wanted_quality_takes_the_fastest_plan_that_keeps_it(tiny, found):
    low, high = (plan.low for plan in found.plans)
    assert low < high
    h2cache.enable(tiny, psnr=(low + high) / 2)
    draw(tiny)
    summary = h2cache.summary(tiny)
    assert summary.evaluated == found.plan(5).steps
    h2cache.enable(tiny, psnr=99.0)
    draw(tiny)
    assert len(h2cache.summary(tiny).evaluated) == 10
    assert "no tuned plan keeps 99.0 dB" in h2cache.summary(tiny).warning


def test_a_wanted_quality_of_an_untuned_model_is_refused_with_the_command(tiny):
    with pytest.raises(ValueError, match=r"analysis\.tune"):
        h2cache.enable(tiny, psnr=40)


def test_other_steps_take_it_by_noise_level_and_say_so(tiny, found):
    h2cache.enable(tiny, evaluations=5)
    draw(tiny, num_inference_steps=20)
    summary = h2cache.summary(tiny)
    assert len(summary.evaluated) == 5
    assert summary.notes == ("tuned at 10 steps, not measured at 20",)


def test_a_stopped_search_goes_on(tiny, tmp_path, monkeypatch):
    drawn, own = [], tuning.Studio.fidelity

    def stopping(self, number, config, saved=False):
        drawn.append(config)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return own(self, number, config, saved)

    path = tmp_path / "plans.json"
    search = {"speedups": (3.3,), "save": path, "progress": False}
    monkeypatch.setattr(tuning.Studio, "fidelity", stopping)
    with pytest.raises(KeyboardInterrupt):
        h2cache.tune(tiny, PROMPTS, **search, **CALL)
    with pytest.raises(ValueError, match="no cache is enabled"):
        h2cache.summary(tiny)
    h2cache.tune(tiny, PROMPTS, **search, **CALL)
    again = len(drawn)
    drawn.clear()
    monkeypatch.setattr(tuning.Studio, "fidelity", lambda *a, **k: drawn.append(a) or own(*a, **k))
    path.unlink()
    h2cache.tune(tiny, PROMPTS, **search, **CALL)
    assert again - 4 < len(drawn)  # the second search found what the first had measured


def test_a_stopped_search_goes_on_with_the_same_picture_and_model_only(tmp_path, monkeypatch):
    """Where a picture is given, a new process has it at another address; a file may be asked for twice."""
    drawn = []

    def stopping(self, number, config, saved=False):
        drawn.append(config)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return own(self, number, config, saved)

    def unfinished(shade: int, name: str) -> set:
        drawn.clear()
        pipe, call = FAMILIES["flux_img2img"]()
        pipe.set_progress_bar_config(disable=True)
        pipe.register_to_config(_name_or_path=name)
        own_call = {k: v for k, v in call.items() if k not in ("image", "prompt", "output_type", "generator")}
        own_call["num_inference_steps"] = 8
        picture = Image.new("RGB", call["image"].size, (shade, 0, 0))
        with pytest.raises(KeyboardInterrupt):
            h2cache.tune(
                pipe, ["a"], speedups=[2], save=tmp_path / "a.json", progress=False, image=picture, **own_call
            )
        return {*tmp_path.glob(".a-*.jsonl")}

    own = tuning.Studio.fidelity
    monkeypatch.setattr(tuning.Studio, "fidelity", stopping)
    first = unfinished(9, "one")
    assert len(first) == 1
    assert unfinished(9, "one") == first
    assert len(unfinished(10, "one")) == 2
    assert len(unfinished(9, "two")) == 3


def test_a_file_is_passed_on(tiny, found, tmp_path):
    path = found.save(tmp_path / "shared.json")
    assert Tuned.load(path) == found
    config = PlanConfig(evaluations=5, file=str(path))
    h2cache.enable(tiny, config)
    draw(tiny)
    assert h2cache.summary(tiny).evaluated == found.plan(5).steps


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plans": [{"steps": "x"}]}', '{"plans": 3}'])
def test_a_broken_file_is_refused_by_name(tiny, tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is no file of tuned plans"):
        h2cache.enable(tiny, PlanConfig(speedup=2, file=str(path)))


def test_the_expectation_follows_what_each_picture_shows(tiny, found, tmp_path):
    facts = json.loads(found.save(tmp_path / "a.json").read_text())
    line = {"slope": 1.0, "offset": 0.0, "error": 1.0}
    facts["estimate"] = line | {"weighted_error": 2.0}
    for plan in facts["plans"]:
        plan["weights"] = [40.0] + [-0.1] * 10
    path = tmp_path / "b.json"
    path.write_text(json.dumps(facts))
    h2cache.enable(tiny, PlanConfig(evaluations=5, file=str(path)))
    prompts = [p["prompt"] for p in PROMPTS]
    generators = [torch.Generator().manual_seed(n) for n in (0, 1)]
    tiny(prompts, **CALL, generator=generators, output_type="latent")
    summary = h2cache.summary(tiny)
    assert summary.expected_error == 2.0
    first, second = summary.expected_psnr
    assert first != second
    draw(tiny)
    alone = h2cache.summary(tiny).expected_psnr
    assert alone == (pytest.approx(first, abs=1e-3),)


def test_a_picture_with_both_branches_in_a_batch_has_one_expectation(tmp_path):
    pipe, call = FAMILIES["dit"]()
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in call.items() if k not in ("class_labels", "generator", "output_type")}
    call |= {"num_inference_steps": 10}
    prompts, path = [{"class_labels": [n]} for n in range(3)], tmp_path / "dit.json"
    h2cache.tune(pipe, prompts, speedups=(2,), trials=1, save=path, progress=False, **call)
    h2cache.enable(pipe, PlanConfig(speedup=2, file=str(path)))
    pipe(**prompts[0], **call)
    assert len(h2cache.summary(pipe).expected_psnr) == 1
    pipe(class_labels=[0, 1], **call)
    assert len(h2cache.summary(pipe).expected_psnr) == 2


@pytest.mark.parametrize("further", [{}, {"within": 1.0, "within_error": 2.0}])
def test_a_file_without_weights_goes_by_the_sum_of_errors(tiny, found, tmp_path, further):
    facts = json.loads(found.save(tmp_path / "a.json").read_text())
    facts["estimate"] = {"slope": 1.0, "offset": 7.0, "error": 1.5, **further}
    path = tmp_path / "b.json"
    path.write_text(json.dumps(facts))
    h2cache.enable(tiny, PlanConfig(evaluations=5, file=str(path)))
    draw(tiny)
    summary = h2cache.summary(tiny)
    total = sum(summary.gap_errors)
    assert summary.expected_psnr == (pytest.approx(7.0 - 20 * math.log10(total)),)
    assert summary.expected_error == 1.5


@pytest.fixture
def table() -> Tuned:
    """Plans of 2, 3 and 5 evaluations of 8 steps: 30, 40 and 50 dB; half the errors give 6 dB more."""

    def plan(steps, mean):
        count = len(steps) - 1
        quality, usual = Quality(9, mean, mean - 4, 2.0), ((0.1,) * count, (0.01,) * count)
        return TunedPlan(steps, quality, None, None, *usual, (mean,) + (0.0,) * 10)

    plans = plan((0, 4), 30.0), plan((0, 3, 6), 40.0), plan((0, 2, 4, 6, 7), 50.0)
    estimate = Estimate(1.0, 0.0, 3.0, 1.0, 2.0)
    return Tuned("m", "s", tuple(1 - n / 8 for n in range(9)), plans, estimate)


@pytest.mark.parametrize(
    ("error", "evaluations"), [(0.001, 3), (0.01, 3), (0.012, 3), (0.02, 5), (0.1, 5), (math.nan, 3)]
)
def test_a_picture_that_is_too_hard_goes_on_with_more_evaluations(table, error, evaluations):
    now = table.expectation(table.plans[1])
    after = table.corrected(now, 38.0, [(Gap(0, 3, 0.1, error),)])
    assert after.plan.evaluations == evaluations
    easy = Gap(0, 3, 0.1, 0.01)
    assert table.corrected(now, 38.0, [(easy,), (Gap(0, 3, 0.1, error),)]).plan is after.plan  # the worst


@pytest.mark.parametrize(("usually", "changes"), [(1e-3, True), (1e3, False)])
def test_a_run_is_corrected_from_its_first_gap_on(tiny, found, tmp_path, usually, changes):
    """Its errors are far larger than usual, or far smaller."""
    facts = json.loads(found.save(tmp_path / "a.json").read_text())
    facts["estimate"] = {"slope": 1.0, "offset": 0.0, "error": 1.0, "within": 1.0, "weighted_error": 1.0}
    for plan in facts["plans"]:
        plan["weights"] = [30.0] + [0.0] * 10
        plan["errors"] = [usually * error for error in plan["errors"]]
    path = tmp_path / "b.json"
    path.write_text(json.dumps(facts))
    few, many = found.plans
    h2cache.enable(tiny, PlanConfig(psnr=few.low, file=str(path)))
    draw(tiny)
    summary = h2cache.summary(tiny)
    gone_on = few.steps[:2] + tuple(step for step in many.steps if step > few.steps[1])
    assert summary.evaluated == (gone_on if changes else few.steps)


def test_what_is_expected_after_a_change_counts_the_gaps_of_both_plans(table):
    now = table.expectation(table.plans[1])
    after = table.corrected(now, 38.0, [(Gap(0, 3, 0.1, 0.02),)])
    assert [(gap.start, gap.end) for gap in after.usual] == [(0, 3), (3, 4), (4, 6), (6, 7)]
    assert after.psnr(after.usual) == 50.0
    twice = [Gap(g.start, g.end, g.change, 2 * g.error) for g in after.usual]
    assert after.psnr(twice) == pytest.approx(50 - 20 * math.log10(2))
    assert (now.error, after.error) == (2.0, 3.0)  # the gaps of a changed run are compared as a sum


def test_quality_says_what_nine_in_ten_reach():
    quality = Quality.of([50.0, 52.0, 48.0])
    assert (quality.mean, quality.worst, quality.deviation) == (50.0, 48.0, 2.0)
    assert TunedPlan((0, 3), quality).low == pytest.approx(47.44)


@pytest.mark.parametrize(("method", "speedup"), [("h2cache", 2.0), ("block_cache", 2.5)])
def test_thresholds_are_found_for_a_speed(tiny, method, speedup):
    found = h2cache.tune(tiny, PROMPTS[:1], method=method, speedup=speedup, progress=False, **CALL)
    assert found.config.name == method
    assert found.speedup == pytest.approx(speedup, rel=0.25)  # ten steps allow few speeds
    h2cache.enable(tiny, found.config)
    draw(tiny)
    assert h2cache.summary(tiny).block_ratio > 1.5


def test_bad_requests_are_refused(tiny):
    with pytest.raises(ValueError, match="prompts is empty"):
        h2cache.tune(tiny, [])
    with pytest.raises(ValueError, match=r"speedup 0\.5 is out of range"):
        h2cache.tune(tiny, PROMPTS, speedups=(0.5,))
    with pytest.raises(ValueError, match="needs a wanted speed"):
        h2cache.tune(tiny, PROMPTS, method="h2cache")
    with pytest.raises(ValueError, match="neither thresholds nor an interval"):
        h2cache.tune(tiny, PROMPTS, method="none", speedup=2.0, progress=False, **CALL)
