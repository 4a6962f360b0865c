"""The part of ComfyUI that our nodes use, written anew for tests: ComfyUI itself is on no registry.

It does what is hard on a cache as ComfyUI does it: blocks write into their inputs, ControlNet is added in
place, cond and uncond come in one batch or one by one as memory allows, and newer models go over a list of
blocks once before their loop.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CHANNELS, TEXT = 12, 4, 5


class Executor:
    """Calls wrappers from the outermost in, then the original; a wrapper calls it to go on."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)


def wrapped(original: Callable, owner: Any, kind: str, options: dict) -> Executor:
    """`original` with the wrappers of `kind` around it; they see `owner` as `class_obj`."""
    groups = options.get("wrappers", {}).get(kind, {}).values()
    return Executor(original, owner, list(itertools.chain(*groups)))


class Mod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor, vec: Tensor) -> Tensor:
        return self.lin(torch.tanh(x + seen.mean(1, keepdim=True))) * vec[:, None]


class DoubleStreamBlock(nn.Module):
    def __init__(self, tidy: bool) -> None:
        super().__init__()
        self.img_mod, self.txt_mod, self.tidy = Mod(), Mod(), tidy

    def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=None):
        both = torch.cat((txt, img), 1)
        img, change = img + self.img_mod(img, both, vec), self.txt_mod(txt, both, vec)
        if self.tidy:
            txt = txt + change
        else:
            txt += change
        return img, torch.nan_to_num(txt, nan=0.0, posinf=65504, neginf=-65504)


class SingleStreamBlock(nn.Module):
    def __init__(self, tidy: bool) -> None:
        super().__init__()
        self.modulation, self.tidy = Mod(), tidy

    def forward(self, x, vec, pe, attn_mask=None, transformer_options=None):
        change = self.modulation(x, x, vec)
        if self.tidy:
            return x + change
        x += change
        return x


class Flux(nn.Module):
    """Two lists of blocks. tidy: writes into nothing. looks: goes over the lists before its loops."""

    patch_size = 2
    dtype = torch.float32

    def __init__(self, tidy: bool = False, looks: bool = False) -> None:
        super().__init__()
        self.tidy, self.looks = tidy, looks
        self.img_in, self.txt_in = nn.Linear(CHANNELS * 4, WIDTH), nn.Linear(TEXT, WIDTH)
        self.time_in, self.final_layer = nn.Linear(1, WIDTH), nn.Linear(WIDTH, CHANNELS * 4)
        self.double_blocks = nn.ModuleList([DoubleStreamBlock(tidy) for _ in range(3)])
        self.single_blocks = nn.ModuleList([SingleStreamBlock(tidy) for _ in range(4)])

    def forward(
        self, x, timestep, context, control=None, transformer_options=None, ref_latents=None, **kwargs
    ):
        img = torch.cat([self.tokens(picture) for picture in (x, *(ref_latents or ()))], 1)
        drawn = self.tokens(x).shape[1]
        img, txt = self.img_in(img), self.txt_in(context)
        vec = torch.sigmoid(self.time_in(timestep[:, None].to(img.dtype)))
        places = transformer_options.get("patches_replace", {}).get("dit", {})
        if self.looks:
            assert [block.__class__ for block in list(self.double_blocks)]
            assert all(sum(1 for _ in block.parameters()) for block in list(self.single_blocks))
        for i, block in enumerate(self.double_blocks):
            given = {
                "img": img,
                "txt": txt,
                "vec": vec,
                "pe": None,
                "transformer_options": transformer_options,
            }
            if ("double_block", i) in places:

                def original(args, block=block):
                    return dict(zip(("img", "txt"), block(**args), strict=True))

                out = places["double_block", i](given, {"original_block": original})
                img, txt = out["img"], out["txt"]
            else:
                img, txt = block(**given)
            img = self.add(img, control, "input", i, 0)
        if img.dtype == torch.float16:
            img = torch.nan_to_num(img, nan=0.0, posinf=65504, neginf=-65504)
        img = torch.cat((txt, img), 1)
        for i, block in enumerate(self.single_blocks):
            given = {"vec": vec, "pe": None, "transformer_options": transformer_options}
            if ("single_block", i) in places:

                def original(args, block=block):
                    return {"img": block(args.pop("img"), **args)}

                img = places["single_block", i]({"img": img, **given}, {"original_block": original})["img"]
            else:
                img = block(img, **given)
            img = self.add(img, control, "output", i, txt.shape[1])
        out = self.final_layer(img[:, txt.shape[1] :][:, :drawn])
        b, _, h, w = x.shape
        return out.view(b, h // 2, w // 2, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    @staticmethod
    def tokens(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)

    def add(self, img: Tensor, control: Any, kind: str, i: int, start: int) -> Tensor:
        added = (control or {}).get(kind, ())
        if i >= len(added) or added[i] is None:
            return img
        if self.tidy:
            img = img.clone()
        img[:, start : start + added[i].shape[1]] += added[i]
        return img


class WanModel(nn.Module):
    """A model of another class, without the lists."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.text = nn.Linear(CHANNELS, CHANNELS), nn.Linear(TEXT, CHANNELS)

    def forward(self, x, timestep, context, transformer_options=None, **kwargs):
        text = self.text(context).mean(1)[:, :, None, None]
        return torch.tanh(self.inner(x.movedim(1, -1)).movedim(-1, 1) + text) + timestep.view(-1, 1, 1, 1)


class CONST:
    """The model predicts a flow's velocity."""

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * sigma.view(-1, *[1] * (x.ndim - 1))

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


class BaseModel:
    def __init__(self, diffusion_model: nn.Module) -> None:
        self.diffusion_model, self.model_sampling = diffusion_model.eval(), CONST()

    def apply_model(
        self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
    ):
        run = wrapped(self._apply_model, self, "apply_model", transformer_options)
        return run(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(self, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        output = self.diffusion_model(
            x.to(self.diffusion_model.dtype),
            t,
            context=c_crossattn.to(self.diffusion_model.dtype),
            control=control,
            transformer_options=transformer_options,
            **kwargs,
        ).float()
        return self.model_sampling.calculate_denoised(t, output, x)


class ModelPatcher:
    """A model, and what is to be changed of it while it is sampled; clones share the model."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.object_patches: dict[str, Any] = {}
        self.patches: dict[str, Tensor] = {}  # of weights, by name
        self.wrappers: dict[str, dict[str, list]] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.object_patches, other.patches = dict(self.object_patches), dict(self.patches)
        other.wrappers = {kind: {k: list(w) for k, w in all_.items()} for kind, all_ in self.wrappers.items()}
        other.model_options = _copied(self.model_options)
        return other

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def get_model_object(self, name: str) -> Any:
        if name in self.object_patches:
            return self.object_patches[name]
        return reduce(getattr, name.split("."), self.model)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Callable]:
        return self.wrappers.get(kind, {}).get(key, [])

    def set_model_patch_replace(self, patch: Callable, name: str, block: str, number: int) -> None:
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault(name, {})[block, number] = patch

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Within it all patches are in place: the objects first, then the weights, by their names."""
        before = {}
        for name, value in self.object_patches.items():
            before[name] = _set(self.model, name, value)
        weights = {name: reduce(getattr, name.split("."), self.model) for name in self.patches}
        for name, weight in weights.items():
            weight += self.patches[name]
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight -= self.patches[name]
            for name, value in before.items():
                _set(self.model, name, value)


def _set(model: Any, name: str, value: Any) -> Any:
    """Put `value` at the place `name` of a model; returns what was there."""
    owner, _, attribute = name.rpartition(".")
    holder = reduce(getattr, owner.split("."), model)
    before = getattr(holder, attribute)
    setattr(holder, attribute, value)
    return before


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


class Guider:
    """Classifier-free guidance. splits(evaluation): whether branches come one by one, for want of memory."""

    def __init__(
        self, patcher: ModelPatcher, conds: list[dict], cfg: float, splits: Callable[[int], bool]
    ) -> None:
        self.model_patcher, self.inner_model, self.cfg, self.splits = patcher, patcher.model, cfg, splits
        self.conds = [{**cond, "uuid": uuid.uuid4()} for cond in conds]
        self.evaluations = 0

    def __call__(self, x, sigma, model_options=None, seed=None):
        run = wrapped(self.predict_noise, self, "predict_noise", model_options["transformer_options"])
        return run(x, sigma, model_options, seed)

    def predict_noise(self, x, sigma, model_options=None, seed=None):
        wanted = [*enumerate(self.conds)]
        apart = self.splits(self.evaluations)
        self.evaluations += 1
        outs: dict[int, Tensor] = {}
        for batch in [[one] for one in wanted] if apart else [wanted[::-1]]:
            conds = [cond for _, cond in batch]
            options = model_options["transformer_options"] | {
                "cond_or_uncond": [kind for kind, _ in batch],
                "uuids": [cond["uuid"] for cond in conds],
                "sigmas": sigma,
            }
            rows = torch.cat([x] * len(batch))
            given = {"ref_latents": conds[0].get("reference_latents")}
            if conds[0].get("control"):
                given["control"] = conds[0]["control"](sigma, len(rows))
            text = torch.cat([cond["text"].expand(len(x), -1, -1) for cond in conds])
            out = self.inner_model.apply_model(
                rows,
                torch.cat([sigma] * len(batch)),
                c_crossattn=text,
                transformer_options=options,
                **{k: v for k, v in given.items() if v is not None},
            )
            outs |= dict(zip(options["cond_or_uncond"], out.chunk(len(batch)), strict=True))
        return outs[0] if len(outs) == 1 else outs[1] + self.cfg * (outs[0] - outs[1])


class Sampler:
    def __init__(self, name: str) -> None:
        self.sampler_function, self.extra_options = SAMPLERS[name], {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent=None, mask=None, disable_pbar=False):
        def model(x, sigma, **extra):
            return guider(x, sigma, **extra)

        model.inner_model = guider
        return self.sampler_function(model, noise * sigmas[0], sigmas, extra_args, callback, disable_pbar)


def sample_euler(model, x, sigmas, extra_args, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"i": i, "denoised": denoised, "x": x})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model, x, sigmas, extra_args, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        ones, length = x.new_ones(len(x)), sigmas[i + 1] - sigmas[i]
        d = (x - model(x, sigmas[i] * ones, **extra_args)) / sigmas[i]
        if callback is not None:
            callback({"i": i, "denoised": x, "x": x})
        guess = x + d * length
        if sigmas[i + 1] > 0:
            d = (d + (guess - model(guess, sigmas[i + 1] * ones, **extra_args)) / sigmas[i + 1]) / 2
        x = x + d * length
    return x


def sample_euler_ancestral(model, x, sigmas, extra_args, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        x = sample_euler(model, x, sigmas[i : i + 2], extra_args)
        x = x + torch.randn_like(x) * sigmas[i + 1] * 0.1
    return x


def sample_dpm_adaptive(model, x, sigmas, extra_args, callback=None, disable=None):
    """Its steps depend on the picture."""
    sigma = sigmas[0]
    while sigma > 0.05:
        denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
        length = sigma * (0.3 + 0.2 * torch.tanh(denoised.abs().mean() * 3))
        x, sigma = x - (x - denoised) / sigma * length, sigma - length
    return x


SAMPLERS = {
    name.removeprefix("sample_"): function
    for name, function in globals().items()
    if name.startswith("sample_")
}


class Double:
    """ComfyUI as the tests see it, emulated."""

    name = "emulation"
    samplers = ("euler", "heun", "euler_ancestral")

    def flux(self, seed: int = 0, half: bool = False, **further: bool) -> ModelPatcher:
        torch.manual_seed(seed)
        model = Flux(**further)
        if half:
            model.half()
            model.dtype = torch.float16
        return ModelPatcher(BaseModel(model))

    def other(self) -> ModelPatcher:
        torch.manual_seed(0)
        return ModelPatcher(BaseModel(WanModel()))

    def diffusion_model(self, patcher: ModelPatcher) -> nn.Module:
        return patcher.model.diffusion_model

    @torch.no_grad()
    def sample(
        self,
        patcher: ModelPatcher,
        steps: int = 8,
        seed: int = 0,
        size: tuple[int, int] = (8, 8),
        batch: int = 1,
        sampler: str = "euler",
        cfg: float = 1.0,
        splits: Callable[[int], bool] = lambda evaluation: False,
        controlled: Callable[[float], bool] | None = None,
        references: int = 0,
        callback: Callable[[dict], None] | None = None,
    ) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        noise = torch.randn(batch, CHANNELS, *size, generator=g)
        texts = [torch.randn(1, 6, TEXT, generator=torch.Generator().manual_seed(n)) for n in (7, 8)]
        kept = {}
        if controlled is not None:
            kept["control"] = lambda sigma, rows: self._control(rows) if controlled(float(sigma[0])) else None
        if references:
            kept["reference_latents"] = [torch.ones(1, CHANNELS, 4, 4) * 0.3] * references
        conds = [{"text": text, **kept} for text in texts[: 1 if cfg == 1.0 else 2]]
        guider = Guider(patcher, conds, cfg, splits)
        options = _copied(patcher.model_options)
        options["transformer_options"]["wrappers"] = patcher.wrappers
        method = Sampler(sampler)
        sigmas = torch.linspace(1, 0, steps + 1) ** 1.5
        with patcher.loaded():
            run = wrapped(method.sample, method, "sampler_sample", options["transformer_options"])
            extra = {"model_options": options, "seed": seed}
            return run(guider, sigmas, extra, callback, noise, None, None, True)

    def with_lora(self, patcher: ModelPatcher, name: str) -> ModelPatcher:
        """As a LoRA node gives it: a clone with one weight changed."""
        clone = patcher.clone()
        clone.patches[name] = torch.full((WIDTH, WIDTH), 0.05)
        return clone

    @staticmethod
    def _control(rows: int) -> dict[str, list]:
        g = torch.Generator().manual_seed(3)
        added = [torch.randn(1, 16, WIDTH, generator=g).expand(rows, -1, -1) for _ in range(3)]
        return {"input": [added[0], added[1]], "output": [None, added[2]]}

    def switch_compile(self, patcher: ModelPatcher) -> None:
        """As TorchCompileModel marks a model."""
        patcher.add_wrapper_with_key("apply_model", "torch.compile", lambda run, *a, **k: run(*a, **k))
