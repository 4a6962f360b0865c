"""Inf-DiT super-resolution of THUDM/Inf-DiT: one list of layers, the first third is the structure stage.

Facts (commit e710c3f on SwissArmyTransformer 0.4.12): the transformer does not call its layers. It counts
through them and calls its hook `layer_forward`, which takes the hidden states and the layer's number. The
model refills the hooks before each call. There is no guidance: one branch. Heun's sampler evaluates each
inner noise level twice in a row; `Upscaler` says which evaluation it is. Layer 0 looks at the
low-resolution picture; it heads the structure stage, so H2-Cache runs it at each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from h2cache.engines.base import Engine, Inputs, one_stack
from h2cache.engines.forms import OneStream
from h2cache.program import Driver, Stream

_HOOK = "layer_forward"


class InfDiT(Engine):
    """Engine of the transformer in Inf-DiT's `DiffusionEngine`."""

    name = "BaseTransformer (Inf-DiT)"
    serves = ("BaseTransformer",)
    cuts = one_stack("layers", OneStream())
    offers = frozenset({"modulated input"})

    def check_request(self, pipeline: Any) -> None:
        if getattr(pipeline, "scheduler", None) is None:
            raise ValueError(
                "Inf-DiT evaluates each noise level twice, so a cache must know which evaluation it sees: "
                "enable it on h2cache.engines.infdit.Upscaler(model), and call that"
            )

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        if missing := {"images", "sigmas", "emb", "hw"} - kwargs.keys():
            raise ValueError(
                f"this BaseTransformer is not given {', '.join(sorted(missing))}, so it is not Inf-DiT's: "
                "no other model of SwissArmyTransformer has an engine here"
            )
        if kwargs.get("inference"):
            raise ValueError(
                "Inf-DiT's modes ar and ar2 keep keys and values of each layer for the next block of the "
                "picture, which a skipped layer would not give: call it with ar=False, ar2=False"
            )
        images: Tensor = kwargs["images"]  # (B, 6, H, W): the noisy picture, then the enlarged one
        return Inputs(
            timestep=kwargs["sigmas"],  # ln(sigma) / 4
            latents=images[:, : images.shape[1] // 2],
            text=kwargs.get("vector"),  # CLIP's of the low-resolution picture, (B, 768)
            conditions=(kwargs.get("direction"),),
            adds_between=False,
        )

    def take_over(
        self, transformer: Any, firsts: dict[str, int], current_call: Callable[[], Driver | None]
    ) -> Callable[[nn.Module], None]:
        """Stand before the hook during each call of the transformer."""

        def begin(transformer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            own = transformer.hooks.get(_HOOK)
            if own is not None and not isinstance(own, _Layers):
                transformer.hooks[_HOOK] = _Layers(own, transformer, current_call)

        def end(transformer: Any, args: tuple, output: Any) -> None:
            layers = transformer.hooks.get(_HOOK)
            if isinstance(layers, _Layers):
                transformer.hooks[_HOOK] = layers.own

        handles = (
            transformer.register_forward_pre_hook(begin, with_kwargs=True),
            transformer.register_forward_hook(end, always_call=True),
        )

        def put_back(transformer: nn.Module) -> None:
            for handle in handles:
                handle.remove()

        return put_back


class _Layers:
    """Stands for the hook: at the first layer it runs a method's program over all, and passes the others."""

    def __init__(self, own: Callable, transformer: Any, current_call: Callable[[], Driver | None]) -> None:
        self.own, self.transformer, self.current_call = own, transformer, current_call

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = self.current_call()
        if call is None:
            return self.own(hidden_states, *args, **kwargs)
        if int(kwargs["layer_id"]):
            return hidden_states
        return call.drive(Stream(hidden_states), _Driven(self, args, kwargs)).img


@dataclass
class _Driven:
    """The layers in one call of the transformer; args, kwargs: the hook's for layer 0."""

    layers: _Layers
    args: tuple
    kwargs: dict[str, Any]

    def run(self, x: Stream, blocks: range) -> Stream:
        img = x.img
        for index in blocks:
            own = self.kwargs | {"layer_id": torch.tensor(index)}
            img = self.layers.own(img, *self.args, **own)
        return Stream(img)

    def added(self, x: Stream, blocks: range) -> None:
        return None

    def modulated_input(self, x: Stream, block: int) -> Tensor:
        mixin: Any = getattr(self.layers.own, "__self__")  # noqa: B009  a method of AdaLNMixin
        shift, scale, *_ = mixin.adaLN_modulations[block](self.kwargs["emb"]).split(x.img.shape[-1], dim=1)
        normed = self.layers.transformer.layers[block].input_layernorm(x.img)
        return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Evaluations:
    """The noise levels at which Heun's sampler evaluates the model, as a scheduler would have them."""

    config: ClassVar = {"sigma_data": 0.5}  # the network's raw output is EDM's

    def __init__(self) -> None:
        self.timesteps: Tensor | None = None
        self.sigmas: Tensor | None = None

    def set_levels(self, sigmas: Tensor) -> None:
        """sigmas: of the sampler's steps, falling, and 0 at the end."""
        inner = sigmas[1:-1].repeat_interleave(2)  # as corrector of a step, then as predictor of the next
        self.sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]]).cpu()
        self.timesteps = self.sigmas[:-1].log() / 4


class Upscaler:
    """An Inf-DiT model as a pipeline: what `h2cache.enable` takes.

    upscaler = Upscaler(model)                      # model: Inf-DiT's DiffusionEngine
    h2cache.enable(upscaler, speedup=3)
    picture = upscaler(shape, images=enlarged, lr_imgs=small, device="cuda")    # as model.sample
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.transformer: Any = model.transformer
        self.scheduler = Evaluations()

    def __call__(self, *args: Any, num_steps: int | None = None, **kwargs: Any) -> Any:
        """What `model.sample` gives."""
        sampler: Any = self.model.sampler
        levels = sampler.discretization(sampler.num_steps if num_steps is None else num_steps, device="cpu")
        self.scheduler.set_levels(levels)
        sample: Any = self.model.sample
        return sample(*args, num_steps=num_steps, **kwargs)
