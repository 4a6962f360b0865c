"""The models that every method is tried on: one list, for the contract tests.

A `Case` has a target (pipeline or transformer) and runs a number of steps on it. Of a family's pipeline the
calls of its transformers are recorded once and played back, so that a test takes milliseconds and sees what
the real pipeline passes: names of branches, keywords, lists, masks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from analysis.drawing.draw import Limits, call_arguments, load_pipeline
from analysis.drawing.families import with_prompt
from analysis.tiny_families import FAMILIES
from tests.helpers.infdit import Evaluated, make_infdit, picture
from tests.helpers.nunchaku_double import make_v1, make_v2
from tests.helpers.toys import denoise, make_flux, make_inputs, standing_still

STEPS = 5
# One of each kind that differs in what its transformer is given; all are run as a whole in test_families.py.
RECORDED = (
    "flux_kontext",
    "flux_controlnet",
    "flux2",
    "flux2_klein_kv",
    "qwen_image_edit",
    "hunyuan_image",
    "hunyuan_video",
    "dit",
    "sd3",
    "z_image",
    "wan22",
    "wan_vace",
    "inf_dit",  # a module of our own: the authors' code is on no registry
)
TRANSFORMERS = ("transformer", "transformer_2")

MODULES = frozenset({"taylorseer", "hicache", "speca", "clusca"})  # of attention and mlp
OUTPUT, LOOK = frozenset({"taylorseer_lite"}), frozenset({"teacache"})
SCHEDULER = frozenset({"plan", "meancache"})  # a transformer alone does not know the noise levels to come
REFUSED = {  # by model: the methods that it refuses with their default settings
    "random": SCHEDULER,
    "one block each": SCHEDULER,
    "embedded": SCHEDULER,
    "nunchaku V1": SCHEDULER | MODULES,
    "nunchaku V2": SCHEDULER | MODULES,
    "z_image": MODULES | OUTPUT | LOOK,
}
REFUSED |= dict.fromkeys(("flux2", "flux2_klein_kv", "sd3", "wan22", "wan_vace", "inf_dit"), MODULES | OUTPUT)


def refused_by(case: str) -> frozenset[str]:
    return REFUSED.get(case, frozenset())


def transformers_of(pipeline) -> list[nn.Module]:
    return [t for name in TRANSFORMERS if (t := getattr(pipeline, name, None)) is not None]


@dataclass(eq=False)
class Case:
    """A FLUX transformer alone, denoising as a pipeline would."""

    target: nn.Module
    inputs: dict
    branches: int = 1
    sizes: tuple[int, int] | None = None  # of the stages, where the model has no lists to tell

    @property
    def transformers(self) -> list[nn.Module]:
        return [self.target]

    @property
    def fresh_starts(self) -> int:
        """Steps of a branch that have nothing to reuse."""
        return len(self.transformers)

    def run(self, branch: int | None = None) -> list[Tensor]:
        """The output of every call of a transformer."""
        return denoise(self.target, STEPS, inputs=self.inputs)

    @cache  # noqa: B019  one object a model lives as long as the tests
    def uncached(self) -> list[Tensor]:
        """`run` before any method is enabled."""
        return self.run()

    def standing_still(self) -> list[Tensor]:
        """`run` where the model itself, but not a cache, sees the inputs of the first step at every step."""
        return standing_still(self.target, [self.inputs | {"timestep": torch.ones(1)}] * STEPS)

    @cache  # noqa: B019
    def uncached_standing_still(self) -> list[Tensor]:
        """`standing_still` before any method is enabled."""
        return self.standing_still()

    @property
    def stage_sizes(self) -> tuple[int, int]:
        """Blocks of the two stages as they should be: by list, or a third of the only list and the rest."""
        if self.sizes:
            return self.sizes
        model = self.transformers[0]
        if hasattr(model, "single_transformer_blocks"):
            return len(model.transformer_blocks), len(model.single_transformer_blocks)
        lists = [getattr(model, name, None) for name in ("transformer_blocks", "blocks", "layers")]
        total = next(len(blocks) for blocks in lists if blocks is not None)
        return round(total / 3), total - round(total / 3)


class Recorded(Case):
    """The calls of a real pipeline's transformers, played back."""

    def __init__(self, pipeline, call: dict) -> None:
        self.calls = record(pipeline, call)
        super().__init__(pipeline, {}, branches=len(self.calls) // STEPS)

    @property
    def transformers(self) -> list[nn.Module]:
        return transformers_of(self.target)

    @property
    def fresh_starts(self) -> int:
        """Klein KV starts afresh once more, when the tokens of the reference are gone."""
        modes = {kwargs.get("kv_cache_mode") for *_, kwargs in self.calls}
        return len(self.transformers) + len(modes) - 1

    def run(self, branch: int | None = None) -> list[Tensor]:
        """The output of all calls, or of those of one guidance branch."""
        return self._played(self.calls if branch is None else self.calls[branch :: self.branches])

    def standing_still(self) -> list[Tensor]:
        return self._played(self.calls, still=True)

    def _played(self, calls: list[tuple], still: bool = False) -> list[Tensor]:
        outputs, further, first = [], {}, {}
        for number, (model, name, args, kwargs) in enumerate(calls):
            given = kwargs | {k: v for k, v in further.items() if k in kwargs}
            key = (model, number % self.branches, kwargs.get("kv_cache_mode"))
            seen = first.setdefault(key, (args, given))
            with ExitStack() as stack:
                if still:  # put on after a cache's own, so that it comes after it
                    hook = model.register_forward_pre_hook(
                        lambda *_, s=seen: (tuple(s[0]), s[1]), with_kwargs=True
                    )
                    stack.callback(hook.remove)
                output = _play(model, name, args, given)
            sample = output[0] if isinstance(output, (tuple, list)) else output.sample
            outputs.append(torch.stack(sample) if isinstance(sample, list) else sample)  # Z-Image: a list
            if isinstance(output, tuple) and len(output) == 2:  # FLUX.2 Klein KV: keys and values for later
                further["kv_cache"] = output[1]
        return outputs


def record(pipeline, call: dict) -> list[tuple]:
    """(transformer, name of the branch, positional and keyword arguments) of each call of a transformer."""
    calls, names = [], [None]

    def note(model: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((model, names[-1], *_kept(args, kwargs)))

    @contextmanager
    def named(name: str, **_) -> Iterator[None]:
        names.append(name)
        yield
        names.pop()

    with ExitStack() as stack, torch.no_grad():
        for model in transformers_of(pipeline):
            stack.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
            if hasattr(model, "cache_context"):
                model.cache_context = named
                stack.callback(delattr, model, "cache_context")
        pipeline(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    return calls


def _kept(args: tuple, kwargs: dict) -> tuple[list, dict]:
    """The arguments with what a pipeline or model may change later copied, and text states as they are."""
    first = [a.clone() if isinstance(a, Tensor) else copy(a) for a in args[:1]]
    latents = {k: v.clone() for k, v in kwargs.items() if k == "hidden_states"}
    dicts = {k: copy(v) for k, v in kwargs.items() if isinstance(v, dict)}
    return first + list(args[1:]), kwargs | latents | dicts


def _play(model: nn.Module, name: str | None, args: list, kwargs: dict):
    with ExitStack() as stack, torch.no_grad():
        if name is not None:
            stack.enter_context(model.cache_context(name))
        return model(*args, **{k: copy(v) if isinstance(v, dict) else v for k, v in kwargs.items()})


@cache
def recorded(family: str) -> Recorded:
    if family == "inf_dit":
        return Recorded(Evaluated(make_infdit()), picture())
    pipeline, call = FAMILIES[family]()
    if family == "hunyuan_image":  # what it has for glyphs is 2048 wide whatever the configuration says
        pipeline.tokenizer_2_max_length = 8  # 128 otherwise
    if family == "qwen_image_edit":  # one token a byte makes its instructions 300 tokens long
        pipeline.prompt_template_encode_start_idx = 0
        pipeline.prompt_template_encode = "<|vision_start|><|image_pad|><|vision_end|>{}"
    return Recorded(pipeline, call)


TRAINED = {"tiny_dit": {"output_type": "np"}, "tiny_wan": {"num_frames": 5, "output_type": "latent"}}


@cache
def trained(model: str) -> Recorded:
    """A model that ships with the repository: its runs take three times as long as those of random ones."""
    pipeline, call = _trained(model)
    return Recorded(pipeline, {k: v for k, v in call.items() if k != "num_inference_steps"})


def call_of(model: str) -> dict:
    """Arguments for a call of `trained(model).target`, with all steps."""
    return _trained(model)[1]


@cache
def _trained(model: str) -> tuple[DiffusionPipeline, dict]:
    folder = f"assets/{model}"
    pipeline, limits = load_pipeline(folder, "cpu", None), Limits.of(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = call_arguments(pipeline, limits, None, None, None) | {"prompt": limits.example}
    return pipeline, with_prompt(pipeline, call) | TRAINED[model]


# FLUX of random weights: of several blocks, of one in each list, and as nunchaku's classes have it.
FLUX = {
    "random": lambda: Case(make_flux(), make_inputs()),
    "one block each": lambda: Case(make_flux(1, 1), make_inputs()),
    "nunchaku V1": lambda: Case(make_v1(), make_inputs(), sizes=(3, 4)),
    "nunchaku V2": lambda: Case(make_v2(), make_inputs()),
}


@cache
def flux_case(name: str) -> Case:
    return FLUX[name]()
