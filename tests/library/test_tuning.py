"""Tuned plans: found by measuring, kept in a file, found again by model, sampler and number of steps."""

import json
import math
import shutil
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import h2cache
from analysis.drawing.draw import load_pipeline
from analysis.tiny_families import FAMILIES
from h2cache import PlanConfig, studio, tuned
from h2cache.api import checkpoint_name
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
    drawing = studio.Studio(tiny, PROMPTS, CALL, 0)
    for plan in found.plans:
        both = (
            PlanConfig(steps=plan.steps, trust=plan.trust),
            PlanConfig(evaluations=plan.evaluations, file="none"),
        )
        best, start = (sum(drawing.fidelity(n, config) for n in (0, 1)) for config in both)
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
    drawn, own = [], studio.Studio.fidelity

    def stopping(self, number, config, saved=False):
        drawn.append(config)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return own(self, number, config, saved)

    path = tmp_path / "plans.json"
    search = {"speedups": (3.3,), "save": path, "progress": False}
    monkeypatch.setattr(studio.Studio, "fidelity", stopping)
    with pytest.raises(KeyboardInterrupt):
        h2cache.tune(tiny, PROMPTS, **search, **CALL)
    with pytest.raises(ValueError, match="no cache is enabled"):
        h2cache.summary(tiny)
    h2cache.tune(tiny, PROMPTS, **search, **CALL)
    again = len(drawn)
    drawn.clear()
    monkeypatch.setattr(studio.Studio, "fidelity", lambda *a, **k: drawn.append(a) or own(*a, **k))
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

    own = studio.Studio.fidelity
    monkeypatch.setattr(studio.Studio, "fidelity", stopping)
    first = unfinished(9, "one")
    assert len(first) == 1
    assert unfinished(9, "one") == first
    assert len(unfinished(10, "one")) == 2
    assert len(unfinished(9, "two")) == 3


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Nothing may be drawn."""

    def never(*_):
        raise AssertionError("it began to draw")

    monkeypatch.setattr(studio.Studio, "draw", never)


def quick(pipe, **further) -> Tuned:
    """A search with one plan for a speed."""
    return h2cache.tune(pipe, PROMPTS[:1], progress=False, **(CALL | {"trials": 1} | further))


def test_a_later_search_keeps_the_plans_for_other_speeds(tiny, found, tmp_path):
    path = found.save(tmp_path / "plans.json")
    more = quick(tiny, speedups=(2, 5), save=path)
    assert [plan.evaluations for plan in more.plans] == [2, 3, 5]
    assert more.plan(3) == found.plan(3)
    assert more.plan(5).tuning.pictures == 1  # searched anew
    assert Tuned.load(path) == more


@pytest.mark.parametrize("other", [{"guidance_scale": 2.0}, {"num_inference_steps": 12}, {"height": 32}])
def test_plans_of_another_call_are_not_kept(tiny, found, tmp_path, other):
    path = found.save(tmp_path / "plans.json")
    assert len(quick(tiny, speedups=(5,), save=path, **other).plans) == 1


def test_plans_of_another_model_are_not_kept(tiny, found, tmp_path):
    facts = json.loads(found.save(tmp_path / "plans.json").read_text())
    path = tmp_path / "other.json"
    path.write_text(json.dumps(facts | {"model": "other"}))
    assert len(quick(tiny, speedups=(5,), save=path).plans) == 1


@pytest.mark.parametrize("learnt", [True, False])
def test_one_more_plan_changes_no_estimate_that_others_were_learnt_with(tiny, found, tmp_path, learnt):
    usual, kept = Estimate(1.0, 2.0, 3.0, 1.0, 4.0 * learnt), tmp_path / "plans.json"
    facts = json.loads(found.save(kept).read_text())
    facts["estimate"] = vars(usual)
    kept.write_text(json.dumps(facts))
    assert quick(tiny, speedups=(5,), save=kept).estimate == usual


def test_a_repeated_search_that_is_stopped_leaves_all_plans(tiny, found, monkeypatch, tmp_path):
    path, own, drawn = found.save(tmp_path / "plans.json"), studio.Studio.fidelity, []

    def stopping(self, number, config, saved=False):
        drawn.append(config)
        if len({len(config.steps) for config in drawn}) == 2:
            raise KeyboardInterrupt
        return own(self, number, config, saved)

    monkeypatch.setattr(studio.Studio, "fidelity", stopping)
    quick(tiny, speedups=(2, 3.3), save=path)
    assert [plan.tuning.pictures for plan in Tuned.load(path).plans] == [1, 2]


def test_a_search_with_a_broken_file_of_another_sampler_about(tiny, tmp_path):
    folder = tmp_path / "cache" / "h2cache" / "plans"
    folder.mkdir(parents=True)
    (folder / f"{checkpoint_name(tiny)}-Other-10.json").write_text("[]")
    assert quick(tiny, speedups=(5,)).plans


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_is_none_is_not_written_over(tiny, found, tmp_path, monkeypatch, named):
    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_text("my notes")
    with pytest.raises(ValueError, match=rf"{path.name} is no file of tuned plans.*move it away"):
        quick(tiny, speedups=(5,), **({"save": path} if named else {}))
    assert path.read_text() == "my notes"


@pytest.mark.parametrize(
    ("place", "says"),
    [("", "is a folder: give a file"), ("notes/plans.json", "notes is a file, not a folder")],
)
@pytest.mark.usefixtures("undrawn")
def test_a_place_that_cannot_be_written_is_refused_before_the_search(tiny, tmp_path, place, says):
    (tmp_path / "notes").write_text("")
    with pytest.raises(ValueError, match=says):
        quick(tiny, save=tmp_path / place)


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(where)`: pictures are NaN where `where(prompts, number, config)` says so."""
    own = studio.Studio.draw

    def begin(where) -> None:
        def draw(self, number, config):
            drawn = own(self, number, config)
            return drawn * np.nan if where(self.prompts, number, config) else drawn

        monkeypatch.setattr(studio.Studio, "draw", draw)

    return begin


@pytest.mark.parametrize(("spoilt", "name"), [(PROMPTS[1], r"prompts\[1\]"), (OTHER[0], r"held_out\[0\]")])
def test_an_uncached_picture_that_is_not_finite_is_refused(tiny, spoil, tmp_path, spoilt, name):
    spoil(lambda prompts, number, config: config is None and prompts[number] == spoilt)
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=rf"{name}: the uncached picture .*another dtype.*leave this"):
        h2cache.tune(
            tiny, PROMPTS, held_out=OTHER, speedups=(5,), trials=1, save=path, progress=False, **CALL
        )
    assert not path.exists()


def test_a_plan_with_pictures_that_are_not_finite_is_a_bad_plan(tiny, spoil, tmp_path):
    spoil(lambda prompts, number, config: config is not None and config.trust is None)
    found = quick(tiny, speedups=(5,), trials=8, save=tmp_path / "a.json")
    assert found.plans[0].trust is not None
    assert found.plans[0].tuning.mean > 0


def test_a_found_plan_with_pictures_that_are_not_finite_is_not_written(tiny, spoil, tmp_path):
    spoil(lambda prompts, number, config: config is not None)
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"prompts\[0\]: the cached picture, with evaluations at \(0, "):
        quick(tiny, speedups=(5,), save=path)
    assert not path.exists()


def test_thresholds_with_pictures_that_are_not_finite_are_bad_ones(tiny, spoil):
    spoil(lambda prompts, number, config: config is not None)
    found = h2cache.tune(tiny, PROMPTS[:1], method="block_cache", speedup=2, progress=False, **CALL)
    assert found.quality.mean == 0.0


def test_plans_of_two_denoisers_know_what_is_usual(tmp_path):
    """The first evaluation of the second one shows no gap."""
    pipe, call = FAMILIES["wan22"]()
    pipe.set_progress_bar_config(disable=True)
    prompt, path = {"prompt": call["prompt"]}, tmp_path / "wan22.json"
    call = {k: v for k, v in call.items() if k not in ("prompt", "generator", "output_type")}
    call |= {"num_inference_steps": 8}
    prompts = [prompt | {"seed": seed} for seed in range(8)]
    found = h2cache.tune(pipe, prompts, speedups=(2,), trials=1, save=path, progress=False, **call)
    (plan,) = found.plans
    assert [(gap.start, gap.end) for gap in plan.gaps] == list(pairwise(plan.steps))
    assert plan.changes.count(0.0) == 1
    h2cache.enable(pipe, PlanConfig(evaluations=4, file=str(path)))
    pipe(**prompt, **call, output_type="latent")
    assert h2cache.summary(pipe).expected_error == found.estimate.weighted_error > 0


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
    prompts, path = [{"class_labels": [n % 3], "seed": n} for n in range(8)], tmp_path / "dit.json"
    h2cache.tune(pipe, prompts, speedups=(2,), trials=1, save=path, progress=False, **call)
    h2cache.enable(pipe, PlanConfig(speedup=2, file=str(path)))
    pipe(class_labels=[0], **call)
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


BAD = [  # prompts, other arguments, what the error says
    ([], {}, "prompts is empty"),
    ("a sign", {}, "prompts='a sign' is one prompt: give a list"),
    (PROMPTS[0], {}, "is one prompt: give a list"),
    (PROMPTS, {"held_out": "xyz"}, "held_out='xyz' is one prompt"),
    ([3], {}, r"prompts\[0\] is a int: give a text"),
    ([{"prompt": "a", "num_inference_steps": 4}], {}, "prompts.*'num_inference_steps'.*give it to tune"),
    ([{"prompt": "a", "sigmas": [1.0]}], {}, "'sigmas': all prompts have the same steps"),
    ([{"prompt": "a", "generator": None}], {}, "'generator': noise goes by seed"),
    (["a"], {"held_out": [{"prompt": "b", "output_type": "pil"}]}, r"held_out\[0\].*leave it out"),
    (PROMPTS, {"output_type": "pil"}, "output_type='pil' cannot be given: pictures are compared"),
    (PROMPTS, {"generator": None}, "generator=None cannot be given: noise goes by seed"),
    (PROMPTS, {"trials": 0}, "trials=0: at least one"),
    (PROMPTS, {"speedups": (0.5,)}, r"speedup 0\.5 is out of range"),
    (PROMPTS, {"speedups": math.nan}, "speedup nan is out of range"),
    (PROMPTS, {"speedups": "3"}, "speedup '3' is out of range"),
    (PROMPTS, {"speedups": ()}, "nothing is left to tune"),
    (PROMPTS, {"speedups": 1.0}, "nothing is left to tune"),
    (PROMPTS, {"speedup": 4}, r"say speedups=\(4,\)"),
    (PROMPTS, {"method": "h2cache"}, "needs a wanted speed"),
]


@pytest.mark.parametrize(("prompts", "further", "says"), BAD)
@pytest.mark.usefixtures("undrawn")
def test_bad_requests_are_refused(tiny, prompts, further, says):
    with pytest.raises(ValueError, match=says):
        h2cache.tune(tiny, prompts, **further)


@pytest.mark.usefixtures("undrawn")
def test_a_bare_transformer_is_refused(tiny):
    with pytest.raises(TypeError, match=r"FluxTransformer2DModel draws no pictures.*the whole pipeline"):
        h2cache.tune(tiny.transformer, PROMPTS)


def test_a_method_without_thresholds_is_refused(tiny):
    with pytest.raises(ValueError, match="neither thresholds nor an interval"):
        h2cache.tune(tiny, PROMPTS, method="none", speedup=2.0, progress=False, **CALL)


@pytest.mark.parametrize("shaped", [iter, np.array])
def test_prompts_and_speeds_may_have_any_shape(tiny, tmp_path, shaped):
    texts = [prompt["prompt"] for prompt in PROMPTS]
    found = h2cache.tune(
        tiny, shaped(texts), held_out=shaped(texts[:1]), speedups=5, trials=1, save=tmp_path / "a.json",
        progress=False, **CALL
    )  # fmt: skip
    assert [plan.evaluations for plan in found.plans] == [2]
    assert found.plans[0].tuning.pictures == 2
    assert found.plans[0].held_out.pictures == 1
