"""The nodes for ComfyUI, in an emulation of our own, and in ComfyUI itself where COMFYUI_PATH names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from h2cache.comfyui.blocks import Walk
from h2cache.comfyui.cache import cache_of
from h2cache.comfyui.engine import DoubleBlocks
from h2cache.comfyui.nodes import (
    COUNT,
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    QUALITY,
    SPEED,
    H2CachePlan,
    H2CacheRule,
    H2CacheSummary,
)
from h2cache.memory import Memory, Request
from h2cache.program import Skip, Stream
from tests.helpers.comfyui_double import Double

STEPS = 8
FOLDER = Path("h2cache/comfyui")


@pytest.fixture(scope="module", params=["emulation", "ComfyUI"])
def comfy(request):
    if request.param == "emulation":
        return Double()
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    from tests.helpers.comfyui_real import Real

    return Real()


def planned(model, evaluations: int, **further):
    return H2CachePlan().apply(model, COUNT, 1.0, evaluations, 30.0, **further)[0]


def ruled(model, tau1: float = 2.0, tau2: float = 2.0, **further):
    return H2CacheRule().apply(model, tau1, tau2, **further)[0]


def summary_of(model):
    return cache_of(model).newest.summary


def calls(comfy, model) -> list[int]:
    """Filled with the rows of each call of the model, from now on."""
    rows: list[int] = []
    inner = comfy.diffusion_model(model)
    inner.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


# Nothing is left out: the very same picture.


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_ancestral"])
def test_as_many_evaluations_as_steps_change_nothing(comfy, sampler):
    model = comfy.flux()
    plain = comfy.sample(model, STEPS, sampler=sampler)
    count = 2 * STEPS - 1 if sampler == "heun" else STEPS
    cached = planned(model, count)
    assert torch.equal(comfy.sample(cached, STEPS, sampler=sampler), plain)
    assert len(summary_of(cached).evaluated) == count


CASES = {
    "alone": {},
    "guidance": {"cfg": 3.0},
    "batch": {"batch": 2},
    "controlled": {"controlled": lambda sigma: True},
    "references": {"references": 2},
    "other size": {"size": (12, 8)},
    "split": {"cfg": 3.0, "splits": lambda evaluation: evaluation in (2, 3)},
}


@pytest.mark.parametrize("case", CASES)
def test_thresholds_of_zero_change_nothing(comfy, case):
    model = comfy.flux()
    plain = comfy.sample(model, STEPS, **CASES[case])
    assert torch.equal(comfy.sample(ruled(model, 0.0, 0.0), STEPS, **CASES[case]), plain)


def test_half_precision_is_clamped_as_the_blocks_do(comfy):
    model = comfy.flux(half=True)
    plain = comfy.sample(model, STEPS)
    assert torch.equal(comfy.sample(ruled(model, 0.0, 0.0), STEPS), plain)
    assert comfy.sample(ruled(model), STEPS).isfinite().all()


def test_what_stands_in_is_no_infinity_in_half_precision():
    large = torch.full((1, 2, 3), 6e4, dtype=torch.float16)

    def program():
        yield Skip(range(2), Stream(large, -large))

    memory = Memory(Request(None, None, ""), "cond", 1)
    walk = Walk(program(), memory, ("structure", "structure"), adds_between=False, entered=None)
    img, txt = walk.serve(None, 0, DoubleBlocks(), (), {"img": large, "txt": -large})
    assert img.unique().tolist() == [65504]
    assert txt.unique().tolist() == [-65504]


# The plan: exactly so many evaluations.


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("splits", ["never", "always", "in between"])
def test_the_plan_makes_exactly_so_many_evaluations(comfy, count, splits):
    """Of each guidance branch, whether both come in one call or in two."""
    apart = {"never": (), "always": range(STEPS), "in between": (0, 3, 7)}[splits]
    model = comfy.flux()
    rows = calls(comfy, model)
    cached = planned(model, count)
    comfy.sample(cached, STEPS, cfg=3.0, splits=lambda evaluation: evaluation in apart)
    summary = summary_of(cached)
    assert sum(rows) == 2 * count
    assert len(summary.evaluated) == count
    assert sorted(summary.branches) == ["cond", "uncond"]
    assert len(rows) == sum(2 if step in apart else 1 for step in summary.evaluated)


def test_branches_keep_their_own_however_they_are_batched(comfy):
    model = comfy.flux()
    together = comfy.sample(planned(model, 4), STEPS, cfg=3.0)
    mixed = comfy.sample(planned(model, 4), STEPS, cfg=3.0, splits=lambda evaluation: evaluation % 2 == 0)
    assert apart(together, mixed) < 1e-4


def test_pictures_of_a_batch_come_out_as_alone(comfy):
    model = comfy.flux()
    rows = calls(comfy, model)
    assert comfy.sample(planned(model, 3), STEPS, batch=3).shape[0] == 3
    assert rows == [3, 3, 3]


def test_a_speed_is_a_number_of_evaluations_on_any_model(comfy):
    model = comfy.other()
    rows = calls(comfy, model)
    plain = comfy.sample(model, STEPS)
    rows.clear()
    cached = H2CachePlan().apply(model, SPEED, 2.0, 1, 30.0)[0]
    assert apart(plain, comfy.sample(cached, STEPS)) < 0.3
    assert len(rows) == STEPS / 2


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "res_multistep", "dpmpp_sde", "uni_pc", "dpm_2"])
def test_samplers_are_known_before_they_run(comfy, sampler):
    if sampler not in comfy.samplers:
        pytest.skip("the emulation has not this sampler")
    model = comfy.flux()
    rows = calls(comfy, model)
    cached = planned(model, 4)
    comfy.sample(cached, STEPS, sampler=sampler)
    assert len(rows) == 4
    assert not any("expected" in note for note in summary_of(cached).notes)


def test_a_sampler_that_goes_by_the_picture_is_left_alone(comfy):
    model = comfy.flux()
    plain = comfy.sample(model, STEPS, sampler="dpm_adaptive")
    cached = planned(model, 500)
    assert torch.equal(comfy.sample(cached, STEPS, sampler="dpm_adaptive"), plain)
    assert comfy.sample(planned(model, 4), STEPS, sampler="dpm_adaptive").isfinite().all()


def test_a_sampler_that_draws_noise_is_told_from_one_that_does_not(comfy):
    model = comfy.flux()
    cached = planned(model, 4)
    with pytest.warns(UserWarning, match="fresh noise"):
        comfy.sample(cached, STEPS, sampler="euler_ancestral")
    comfy.sample(cached, STEPS, sampler="euler")
    assert not summary_of(cached).notes


def test_outside_of_start_and_end_all_is_evaluated(comfy):
    model, window = comfy.flux(), {"start_percent": 0.3, "end_percent": 0.8}
    rows = calls(comfy, model)
    least = planned(model, 1, **window)  # a wish that cannot be met: one evaluation is left of the middle
    comfy.sample(least, 12)
    steps = summary_of(least).evaluated
    skipped = set(range(12)) - set(steps)
    assert {0, 11} <= set(steps)
    assert skipped == set(range(min(skipped), max(skipped) + 1))
    rows.clear()
    more = planned(model, len(steps) + 1, **window)
    comfy.sample(more, 12)
    assert len(rows) == len(summary_of(more).evaluated) == len(steps) + 1
    assert summary_of(more).steps == 12


def test_a_controlnet_that_ends_in_mid_run_begins_afresh(comfy):
    model = comfy.flux()
    cached = planned(model, 3)
    comfy.sample(cached, STEPS, controlled=lambda sigma: sigma > 0.5)
    assert 3 <= len(summary_of(cached).evaluated) <= 4


# The paper's rule.


def test_what_is_skipped_is_not_run(comfy):
    model = comfy.flux()
    run = {"double": [], "single": []}
    inner = comfy.diffusion_model(model)
    for kind, blocks in (("double", inner.double_blocks), ("single", inner.single_blocks)):
        for n, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *args, n=n, kind=kind: run[kind].append(n))
    cached = ruled(model)
    comfy.sample(cached, STEPS)
    summary = summary_of(cached)
    assert summary.hits["structure"] > 0
    assert len(run["double"]) + len(run["single"]) == summary.blocks_run < summary.blocks
    assert run["double"].count(0) == run["single"].count(0) == STEPS  # the first of a stage always runs
    assert run["double"].count(1) == STEPS - summary.hits["structure"]


@pytest.mark.parametrize("case", CASES)
def test_blocks_that_write_into_their_inputs_make_no_difference(case):
    """Nor what is added in place between blocks, nor a look at the lists before their loops."""
    comfy = Double()
    pictures = [
        comfy.sample(ruled(comfy.flux(tidy=tidy, looks=looks), 0.4, 0.4), STEPS, **CASES[case])
        for tidy, looks in ((True, False), (False, False), (False, True))
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_controlnet_acts_at_skipped_steps_too(comfy):
    """A ControlNet is added by number of block; what stands in has none of it."""
    model = comfy.flux()
    plain = comfy.sample(model, STEPS)
    controlled = comfy.sample(model, STEPS, controlled=lambda sigma: True)
    cached = comfy.sample(ruled(model, 1.0, 1.0), STEPS, controlled=lambda sigma: True)
    assert apart(controlled, cached) < apart(controlled, plain)


def around(seen: list):
    def patch(args, extra):
        seen.append(1)
        return extra["original_block"](args)

    return patch


@pytest.mark.parametrize(
    "place", [("double_block", 0), ("double_block", 2), ("single_block", 1), ("single_block", 3)]
)
def test_patches_around_a_block_are_called_at_every_step(comfy, place):
    model, seen = comfy.flux().clone(), []
    plain = comfy.sample(model, STEPS)
    model.set_model_patch_replace(around(seen), "dit", *place)
    assert torch.equal(comfy.sample(ruled(model, 0.0, 0.0), STEPS), plain)
    seen.clear()
    cached = ruled(model)
    comfy.sample(cached, STEPS)
    assert summary_of(cached).hits["structure"] > 0
    assert len(seen) == STEPS


@pytest.mark.parametrize(
    "place", [("double_block", 0), ("double_block", 2), ("single_block", 0), ("single_block", 3)]
)
def test_patches_may_leave_a_block_out(comfy, place):
    model = comfy.flux().clone()
    model.set_model_patch_replace(lambda args, extra: args, "dit", *place)
    plain = comfy.sample(model, STEPS)
    assert torch.equal(comfy.sample(ruled(model, 0.0, 0.0), STEPS), plain)
    assert comfy.sample(ruled(model), STEPS).isfinite().all()


def test_other_classes_are_refused_by_name(comfy):
    with pytest.raises(TypeError, match=r"WanModel.*H2-Cache Plan"):
        ruled(comfy.other())


@pytest.mark.parametrize("predictor", ["taylor", "hermite", "dmd"])
def test_forecasts_stand_in(comfy, predictor):
    model = comfy.flux()
    cached = ruled(model, predictor=predictor)
    assert apart(comfy.sample(model, STEPS), comfy.sample(cached, STEPS)) < 1
    assert summary_of(cached).hits["structure"] > 0


# Nothing mixes, nothing stays.


@pytest.mark.parametrize("cached", [lambda model: planned(model, 3), ruled], ids=["plan", "rule"])
def test_two_models_in_one_graph_do_not_mix(comfy, cached):
    first, second = cached(comfy.flux(0)), cached(comfy.flux(1))
    alone = [comfy.sample(first, STEPS), comfy.sample(second, STEPS, cfg=3.0)]
    inner = []

    def draw_the_other(step):
        if step["i"] == 3:
            inner.append(comfy.sample(second, STEPS, cfg=3.0))

    assert torch.equal(comfy.sample(first, STEPS, callback=draw_the_other), alone[0])
    assert torch.equal(inner[0], alone[1])


@pytest.mark.parametrize("cached", [lambda model: planned(model, 3), ruled], ids=["plan", "rule"])
def test_an_interrupted_run_leaves_nothing(comfy, cached):
    class Interrupted(Exception):
        pass

    def stop(step):
        if step["i"] == 3:
            raise Interrupted

    model = comfy.flux()
    wanted = comfy.sample(cached(model), STEPS, seed=1, size=(12, 8), batch=2)
    one = cached(model)
    with pytest.raises(Interrupted):
        comfy.sample(one, STEPS, callback=stop)
    assert cache_of(one).newest.request.bytes_held == 0
    assert torch.equal(comfy.sample(one, STEPS, seed=1, size=(12, 8), batch=2), wanted)
    assert cache_of(one).newest.request.bytes_held == 0
    assert summary_of(one).steps == STEPS


@pytest.mark.parametrize("cached", [lambda model: planned(model, 3), ruled], ids=["plan", "rule"])
def test_other_clones_of_the_model_are_untouched(comfy, cached):
    model = comfy.flux()
    blocks = comfy.diffusion_model(model).double_blocks
    plain = comfy.sample(model, STEPS)
    fast = comfy.sample(cached(model), STEPS)
    assert not torch.equal(fast, plain)
    assert torch.equal(comfy.sample(model.clone(), STEPS), plain)
    assert comfy.diffusion_model(model).double_blocks is blocks
    later = cached(model).clone()  # as a LoRA node behind ours makes it
    assert torch.equal(comfy.sample(later, STEPS), fast)


def test_a_second_node_takes_the_place_of_the_first(comfy):
    model = comfy.flux()
    plain = comfy.sample(model, STEPS)
    assert torch.equal(comfy.sample(planned(ruled(planned(model, 3)), STEPS), STEPS), plain)
    assert torch.equal(comfy.sample(ruled(ruled(planned(model, 3)), 0.0, 0.0), STEPS), plain)


def test_the_cache_of_the_core_is_refused(comfy):
    model = comfy.flux().clone()
    model.model_options["transformer_options"]["easycache"] = {}
    with pytest.raises(ValueError, match="EasyCache"):
        comfy.sample(planned(model, 3), STEPS)


def test_a_compiled_model_goes_with_the_plan_alone(comfy):
    model = comfy.flux().clone()
    plain = comfy.sample(model, STEPS)
    comfy.switch_compile(model)
    assert torch.equal(comfy.sample(planned(model, STEPS), STEPS), plain)
    with pytest.raises(ValueError, match="TorchCompileModel"):
        comfy.sample(ruled(model), STEPS)


@pytest.mark.parametrize("block", ["double_blocks.1.img_mod", "single_blocks.2.modulation"])
def test_a_lora_acts_before_and_behind_our_node(comfy, block):
    """Its weights are found by the names that they have without us."""
    model, weight = comfy.flux(), f"diffusion_model.{block}.lin.weight"
    plain, changed = comfy.sample(model, STEPS), comfy.sample(comfy.with_lora(model, weight), STEPS)
    assert not torch.equal(plain, changed)
    before = ruled(comfy.with_lora(model, weight), 0.0, 0.0)
    behind = comfy.with_lora(ruled(model, 0.0, 0.0), weight)
    assert torch.equal(comfy.sample(before, STEPS), changed)
    assert torch.equal(comfy.sample(behind, STEPS), changed)
    assert comfy.sample(ruled(comfy.with_lora(model, weight)), STEPS).isfinite().all()


# The summary, and what a user sees.


def test_the_summary_tells_in_words_and_in_a_picture(comfy):
    model = comfy.flux()
    for cached in (planned(model, 3), ruled(model)):
        latent = {"samples": comfy.sample(cached, STEPS, cfg=3.0)}
        report = H2CacheSummary().report(cached, latent)
        same, text, trace = report["result"]
        assert same is latent
        assert report["ui"]["text"] == [text]
        assert trace.shape[0] == 1
        assert trace.shape[3] == 3
        assert 0 <= trace.min() < trace.max() <= 1
        assert trace.unique().numel() > 8
    assert "blocks executed" in text


def test_the_summary_says_what_is_missing(comfy):
    model = comfy.flux()
    with pytest.raises(ValueError, match="no H2-Cache is on this model"):
        H2CacheSummary().report(model, {})
    with pytest.raises(ValueError, match="not been sampled"):
        H2CacheSummary().report(planned(model, 3), {})


def test_wishes_out_of_range_and_qualities_without_tuned_plans_are_refused(tmp_path):
    model = Double().flux()
    with pytest.raises(ValueError, match="no tuned plans"):
        H2CachePlan().apply(model, QUALITY, 3.0, 10, 35.0)
    with pytest.raises(ValueError, match=r"start 0.5 and end 0.5"):
        planned(model, 3, start_percent=0.5, end_percent=0.5)
    file = tmp_path / "none.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="no file of tuned plans"):
        planned(model, 3, tuned=str(file))


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_every_input_has_a_tooltip_and_a_default_in_its_range(name):
    node = NODE_CLASS_MAPPINGS[name]
    assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("H2-Cache")
    assert callable(getattr(node, node.FUNCTION))
    for kind, options in node.INPUT_TYPES()["required"].values():
        assert options["tooltip"]
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("workflows/*.json")), ids=lambda path: path.stem)
def test_workflows_use_our_nodes_as_they_are(path):
    flow = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in flow["nodes"]}
    ours = [node for node in nodes.values() if node["type"] in NODE_CLASS_MAPPINGS]
    assert {node["type"] for node in ours} >= {"H2CacheSummary"}
    for node in ours:
        inputs = NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"]
        widgets = [
            (kind, o)
            for kind, o in inputs.values()
            if isinstance(kind, list) or kind not in ("MODEL", "LATENT")
        ]
        values = node.get("widgets_values", [])
        assert len(values) == len(widgets)
        for value, (kind, _) in zip(values, widgets, strict=True):
            assert value in kind if isinstance(kind, list) else isinstance(value, (int, float, str))
    for number, source, out, target, into, kind in flow["links"]:
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == number
        assert nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"] == kind


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("custom", sys.argv[1] + "/__init__.py")
module = sys.modules["custom"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(*sorted(module.NODE_CLASS_MAPPINGS), "diffusers" in sys.modules)
"""


def test_a_link_into_custom_nodes_is_enough(tmp_path):
    """Nothing is installed, and of diffusers, which ComfyUI does not have, nothing is imported."""
    (tmp_path / "custom_nodes").mkdir()
    link = tmp_path / "custom_nodes" / "h2cache"
    link.symlink_to(FOLDER.resolve(), target_is_directory=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", LOAD, str(link)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*sorted(NODE_CLASS_MAPPINGS), "False"]
