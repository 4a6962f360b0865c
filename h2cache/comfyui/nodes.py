"""The nodes. They hold settings only: what runs is in cache.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from h2cache import predictors
from h2cache.comfyui.cache import BlockCache, WholeCache, cache_of
from h2cache.comfyui.trace import draw
from h2cache.h2 import H2Config
from h2cache.method import MethodConfig
from h2cache.plan import PlanConfig

CATEGORY = "model/cache"
SPEED, COUNT, QUALITY = "speed-up", "evaluations", "expected PSNR"
_MODEL = ("MODEL", {"tooltip": "After LoRA and other nodes that change the model, before the sampler."})
_WINDOW = {
    "start_percent": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "Evaluate all steps before this share.",
        },
    ),
    "end_percent": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "Evaluate all steps from this share on.",
        },
    ),
}


def _number(default: float, low: float, high: float, step: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    kind = "INT" if all(isinstance(value, int) for value in (default, low, high, step)) else "FLOAT"
    return kind, {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip}


class H2CachePlan:
    """Ask for a speed or a quality: exactly so many evaluations of the model, outputs forecast in between."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Fewer evaluations of the model: exactly as many as you ask for. Works on every model."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": _MODEL,
                "ask_for": ([SPEED, COUNT, QUALITY], {"tooltip": "Which of the next three numbers counts."}),
                "speedup": _number(
                    3.0,
                    1.0,
                    20.0,
                    0.1,
                    "How many times fewer evaluations: steps / speed-up, rounded. 1: as without.",
                ),
                "evaluations": _number(
                    10,
                    1,
                    1000,
                    1,
                    "Evaluations of the model, for each guidance branch. As many as steps: as without.",
                ),
                "psnr": _number(
                    35.0,
                    10.0,
                    100.0,
                    0.5,
                    "dB against the uncached picture, for 9 in 10 pictures. Needs tuned plans.",
                ),
                **_WINDOW,
                "tuned": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Tuned plans: a .json file, or a model's name to look up in your cache "
                        "folder. Empty: the default steps.",
                    },
                ),
            }
        }

    def apply(
        self,
        model: Any,
        ask_for: str,
        speedup: float,
        evaluations: int,
        psnr: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        tuned: str = "",
    ) -> tuple[Any]:
        is_file = tuned.endswith(".json")
        config = PlanConfig(
            speedup=speedup if ask_for == SPEED else None,
            evaluations=evaluations if ask_for == COUNT else None,
            psnr=psnr if ask_for == QUALITY else None,
            file=tuned if is_file else "",
            model="" if is_file else tuned,
        ).for_checkpoint(None)
        return (WholeCache(config, start_percent, end_percent, _inside).attach(model),)


def _inside(config: MethodConfig, steps: int, outside: int) -> MethodConfig:
    """The plan of a run where it does not act at `outside` of all `steps`: the wish is for all together."""
    if not outside or not isinstance(config, PlanConfig) or config.psnr is not None:
        return config
    count = config.evaluations or round(steps / (config.speedup or 1))
    return replace(config, speedup=None, evaluations=max(1, count - outside))


class H2CacheRule:
    """The paper's rule on FLUX: two stages, two thresholds."""

    CATEGORY = CATEGORY
    DESCRIPTION = "The rule of the H2-Cache paper, which decides about FLUX's blocks at every step."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": _MODEL,
                "tau1": _number(
                    0.15,
                    0.0,
                    2.0,
                    0.005,
                    "Structure threshold. Higher: faster, the layout drifts. 0: always compute.",
                ),
                "tau2": _number(
                    0.22,
                    0.0,
                    2.0,
                    0.005,
                    "Detail threshold. Higher: faster, letters blur. 0: always compute.",
                ),
                "pool1": _number(
                    2048, 1, 65536, 1, "PFS of the structure check: tokens that are kept at least."
                ),
                "pool2": _number(384, 1, 65536, 1, "PFS of the detail check: tokens that are kept at least."),
                "predictor": (
                    [*predictors.NAMES],
                    {"tooltip": "What stands in: 'last' as in the paper, or a forecast."},
                ),
                **_WINDOW,
            }
        }

    def apply(
        self,
        model: Any,
        tau1: float,
        tau2: float,
        pool1: int = 2048,
        pool2: int = 384,
        predictor: str = "last",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> tuple[Any]:
        config = H2Config(tau1=tau1, tau2=tau2, pool1=pool1, pool2=pool2, predictor=predictor)
        return (BlockCache(config, start_percent, end_percent).attach(model),)


class H2CacheSummary:
    """What the newest run of a model did."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Evaluations, hits and the expected quality of the run that made this latent."
    RETURN_TYPES = ("LATENT", "STRING", "IMAGE")
    RETURN_NAMES = ("latent", "text", "trace")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "That of an H2-Cache node, as the sampler gets it."}),
                "latent": ("LATENT", {"tooltip": "What the sampler gives: so this node runs after it."}),
            }
        }

    def report(self, model: Any, latent: Any) -> dict[str, Any]:
        cache = cache_of(model)
        if cache is None:
            raise ValueError("no H2-Cache is on this model: connect the MODEL that an H2-Cache node gives")
        if cache.newest is None:
            raise ValueError("this model has not been sampled yet: connect the LATENT that its sampler gives")
        summary = cache.newest.summary
        text, trace = str(summary), draw(cache.newest)
        return {"ui": {"text": [text]}, "result": (latent, text, trace)}


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "H2CachePlan": H2CachePlan,
    "H2Cache": H2CacheRule,
    "H2CacheSummary": H2CacheSummary,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "H2CachePlan": "H2-Cache Plan",
    "H2Cache": "H2-Cache",
    "H2CacheSummary": "H2-Cache Summary",
}
