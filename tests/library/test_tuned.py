"""Files of tuned plans in use: what is refused, what is passed by, and a wanted quality in a run."""

import json
import math
from dataclasses import replace

import pytest
import torch

import h2cache
from analysis.tiny_families import FAMILIES
from h2cache import PlanConfig, tuned
from h2cache.api import last_course
from h2cache.expected import Estimate
from h2cache.tuned import Quality, Tuned, TunedPlan
from tests.helpers.plans import Loop, Toy, sampler

STEPS = 20
PLANS = {4: (0, 6, 12, 17), 7: (0, 3, 6, 9, 12, 15, 18), 10: tuple(range(0, 20, 2))}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")


@pytest.fixture
def pipe() -> Loop:
    return Loop(Toy(), sampler("flow Euler"))


def table_of(pipe, error: float) -> Tuned:
    """Plans of 40, 50 and 60 dB, whose lines usually miss by `error` over each gap."""
    h2cache.enable(pipe, speedup=1.0)
    pipe(STEPS)
    course = last_course(pipe)
    plans = []
    for mean, steps in zip((40.0, 50.0, 60.0), PLANS.values(), strict=True):
        usual = (0.1,) * (len(steps) - 1), (error,) * (len(steps) - 1)
        plans.append(
            TunedPlan(steps, Quality(9, mean, mean - 2, 1.0), None, None, *usual, (mean,) + (0.0,) * 10)
        )
    estimate = Estimate(1.0, 0.0, 3.0, 1.0, 2.0)
    return Tuned("toy", course.sampler, course.levels, tuple(plans), estimate)


@pytest.fixture
def hard(pipe, tmp_path):
    """A file by which every picture is far harder than usual."""
    return table_of(pipe, 1e-6).save(tmp_path / "hard.json")


@pytest.fixture
def easy(pipe, tmp_path):
    return table_of(pipe, 1e3).save(tmp_path / "easy.json")


def evaluated(pipe) -> dict[str, tuple[int, ...]]:
    """The evaluated steps of each branch."""
    found = {}
    for record in h2cache.step_records(pipe):
        if record.outcome == "miss":
            found[record.branch] = (*found.get(record.branch, ()), record.step)
    return found


def test_the_fastest_plan_is_taken_whatever_the_order_in_the_file(pipe, easy):
    facts = json.loads(easy.read_text())
    facts["plans"].reverse()
    easy.write_text(json.dumps(facts))
    h2cache.enable(pipe, PlanConfig(psnr=38.0, file=str(easy)))
    pipe(STEPS)
    assert h2cache.summary(pipe).evaluated == PLANS[4]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [0, 5, 77]},
        {"steps": [0, -1, 5]},
        {"steps": [0, 5, 5]},
        {"steps": [1, 5, 9]},
        {"steps": [0, 5.0, 9]},
        {"steps": ["0", "5"]},
        {"steps": []},
        {"trust": 7},
        {"trust": math.nan},
        {"tuning": {"pictures": 1, "mean": math.nan, "worst": 1.0, "deviation": 0.0}},
        {"weights": [math.nan] * 11},
        {"errors": [math.inf] * 3},
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_followed_is_refused_by_the_files_name(pipe, easy, change):
    facts = json.loads(easy.read_text())
    facts["plans"][0].update(change)
    easy.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"easy\.json is no file of tuned plans"):
        h2cache.enable(pipe, PlanConfig(speedup=5, file=str(easy)))


def test_levels_that_are_none_are_refused_by_the_files_name(pipe, easy):
    facts = json.loads(easy.read_text())
    easy.write_text(json.dumps(facts | {"levels": facts["levels"][:5]}))
    with pytest.raises(ValueError, match=r"easy\.json is no file of tuned plans"):
        h2cache.enable(pipe, PlanConfig(speedup=5, file=str(easy)))


@pytest.mark.parametrize("text", ["", "{}", '{"plans": ['])
def test_a_broken_file_in_the_users_folder_is_passed_by(pipe, easy, text):
    folder = tuned.user_folder()
    Tuned.load(easy).save(folder / "toy-good.json")
    (folder / "toy-broken.json").write_text(text)
    (folder / "toy-folder.json").mkdir()
    h2cache.enable(pipe, PlanConfig(evaluations=4, model="toy"))
    with pytest.warns(UserWarning, match="not used"):
        pipe(STEPS)
    assert h2cache.summary(pipe).evaluated == PLANS[4]


def test_a_name_with_brackets_is_found(pipe, easy):
    known = replace(Tuned.load(easy), model="toy[v2]*")
    known.save(tuned.user_folder() / known.file_name)
    h2cache.enable(pipe, PlanConfig(psnr=38.0, model="toy[v2]*"))
    pipe(STEPS)
    assert h2cache.summary(pipe).evaluated == PLANS[4]


def test_what_was_tuned_elsewhere_says_so(pipe, easy):
    for scheduler, steps, words in (
        (sampler("flow Euler"), 40, "tuned at 20 steps, not measured at 40"),
        (sampler("flow Heun"), STEPS, "not measured with FlowMatchHeunDiscreteScheduler"),
        (sampler("flow Euler dynamic"), STEPS, "tuned at other noise levels"),
    ):
        pipe.scheduler = scheduler
        h2cache.enable(pipe, PlanConfig(evaluations=4, file=str(easy)))
        pipe(steps)
        assert words in " ".join(h2cache.summary(pipe).notes)


def test_a_class_made_from_a_sampler_of_diffusers_is_that_sampler(pipe, easy):
    class Mine(type(pipe.scheduler)):
        pass

    pipe.scheduler = Mine.from_config(pipe.scheduler.config)
    h2cache.enable(pipe, PlanConfig(psnr=38.0, file=str(easy)))
    pipe(STEPS)
    assert h2cache.summary(pipe).evaluated == PLANS[4]
    assert not h2cache.summary(pipe).notes


@pytest.mark.parametrize("setting", [{"trust": 0.0}, {"target": "ode"}])
def test_a_quality_is_known_for_plans_as_they_were_tuned_only(pipe, easy, setting):
    with pytest.raises(ValueError, match="leave trust and target out"):
        PlanConfig(psnr=38.0, file=str(easy), **setting)
    h2cache.enable(pipe, PlanConfig(evaluations=4, file=str(easy), **setting))
    pipe(STEPS)
    assert h2cache.summary(pipe).expected_psnr is None


@pytest.mark.parametrize("branches", [(None,), (None, None), ("cond", "uncond")])
def test_all_guidance_branches_are_corrected_alike(pipe, hard, branches):
    h2cache.enable(pipe, PlanConfig(psnr=38.0, file=str(hard)))
    pipe(STEPS, branches=branches, text=torch.ones(1, 5, 3))
    found = evaluated(pipe)
    assert len(found) == len(branches)
    assert len(set(found.values())) == 1
    (steps,) = set(found.values())
    assert steps[:2] == PLANS[4][:2]
    assert len(steps) > 4
    assert len(h2cache.summary(pipe).gap_errors) == len(steps) - 1


@pytest.mark.parametrize("at", [3, 8, 13])
def test_a_correction_outlives_a_new_beginning_in_mid_run(pipe, hard, at):
    def again(loop, step, given):
        if step == at:
            h2cache.restart(loop)

    h2cache.enable(pipe, PlanConfig(psnr=38.0, file=str(hard)))
    pipe(STEPS)
    (plain,) = evaluated(pipe).values()
    pipe(STEPS, callback=again)
    (steps,) = evaluated(pipe).values()
    assert at + 1 in steps
    assert [s for s in steps if s > at + 1] == [s for s in plain if s > at + 1] or at < PLANS[4][1]
    assert len(steps) > 4


def test_a_batch_that_changes_in_mid_run_is_gone_on_with(pipe, hard):
    """As of pipelines that end guidance before the last step."""

    def halve(loop, step, given):
        if step == 9:
            given["latents"] = given["latents"][:1]

    h2cache.enable(pipe, PlanConfig(psnr=38.0, file=str(hard)))
    out = pipe(
        STEPS, latents=torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), callback=halve
    )
    assert out.shape[0] == 1
    assert out.isfinite().all()


def test_a_correction_ends_with_its_request(pipe, hard):
    h2cache.enable(pipe, PlanConfig(psnr=38.0, file=str(hard)))
    pipe(STEPS)
    (first,) = evaluated(pipe).values()
    pipe(STEPS)
    assert evaluated(pipe) == {"call 0": first}


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_outputs_that_are_not_finite_promise_nothing(pipe, easy, odd):
    h2cache.enable(pipe, PlanConfig(evaluations=4, file=str(easy)))
    pipe(STEPS, latents=torch.full((1, 6, 4), odd))
    summary = h2cache.summary(pipe)
    assert summary.expected_psnr is None
    assert "not finite" in summary.warning


@pytest.mark.parametrize(("usual", "notes"), [(40.0, 1), (59.0, 0)])
def test_a_quality_that_is_not_expected_to_be_reached_is_said(pipe, easy, usual, notes):
    facts = json.loads(easy.read_text())
    facts["plans"][-1]["weights"][0] = usual
    easy.write_text(json.dumps(facts))
    h2cache.enable(pipe, PlanConfig(psnr=58.0, file=str(easy)))
    pipe(STEPS)
    words = "asked for 58 dB, which is not expected to be reached"
    assert h2cache.summary(pipe).notes == (words,) * notes


def test_a_picture_that_is_harder_than_usual_says_that_its_plan_changed(pipe, hard):
    h2cache.enable(pipe, PlanConfig(psnr=38.0, file=str(hard)))
    pipe(STEPS)
    assert "harder than usual" in h2cache.summary(pipe).notes[0]


def test_a_run_that_skips_nothing_expects_nothing(pipe, easy):
    h2cache.enable(pipe, PlanConfig(evaluations=STEPS, file=str(easy)))
    pipe(STEPS)
    assert h2cache.summary(pipe).expected_psnr is None


def test_a_picture_of_a_model_that_takes_lists_comes_out_as_it_would_alone():
    """Z-Image: an output is a list of (C, F, H, W), one for each picture."""
    pipe, call = FAMILIES["z_image"]()
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in call.items() if k not in ("prompt", "generator", "output_type", "prompt_embeds")}
    call |= {"num_inference_steps": 12, "output_type": "latent", "guidance_scale": 0.0}
    width = pipe.text_encoder.config.hidden_size if pipe.text_encoder else 16
    texts = [torch.randn(6, width, generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def draw(numbers):
        generators = [torch.Generator().manual_seed(n) for n in numbers]
        return pipe(prompt=None, prompt_embeds=[texts[n] for n in numbers], generator=generators, **call)[0]

    h2cache.enable(pipe, PlanConfig(evaluations=6, file="none"))
    together = draw([0, 1, 2])
    alone = draw([1])
    assert torch.allclose(together[1], alone[0], atol=1e-5)
