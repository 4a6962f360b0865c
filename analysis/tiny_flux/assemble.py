"""Put the trained parts together as a diffusers folder (fp16) that `FluxPipeline.from_pretrained` loads.

    python -m analysis.tiny_flux.assemble --work work/tiny --out assets/tiny_flux

--work holds text_encoder, text_encoder_2, tokenizer, tokenizer_2 (from text_encoders), vae (from vae) and
checkpoint.pt (from train). Only the files of the pipeline and limits.json are written; others in --out stay.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from analysis.recipes import (
    assemble_command,
    change_json,
    finished,
    known_words,
    portable_tokenizers,
    write_json,
)
from analysis.tiny_flux.model import load_transformer
from analysis.tiny_flux.text_encoders import MAX_TOKENS

EXAMPLE = 'a red round sign that says "CAFE" on a striped green background'
CLIP_PREFIX = "text_model."


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's own."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def portable_names(file: Path) -> None:
    """transformers 5 drops the prefix of CLIP's weights, without which 4.x silently draws them at random.

    Both know the names with it, which are those of the hub's checkpoints.
    """
    weights = {CLIP_PREFIX + k.removeprefix(CLIP_PREFIX): v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)


def limits(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the model can be asked for, in the form the command line reads."""
    return {
        "height": [128],
        "width": [128],
        "quoted_word": "[A-Z]{1,5}",
        "vocabulary": known_words(tokenizer),
        "example": EXAMPLE,
        "cpu_threads": 1,  # so small a model only loses by sharing its work
    }


def assemble(work: Path, out: Path) -> None:
    half = torch.float16
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    pipe = FluxPipeline(
        scheduler=scheduler(),
        vae=AutoencoderKL.from_pretrained(work / "vae").to(half),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder", dtype=half),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel.from_pretrained(work / "text_encoder_2", dtype=half),
        tokenizer_2=PreTrainedTokenizerFast.from_pretrained(work / "tokenizer_2"),
        transformer=load_transformer(work / "checkpoint.pt").to(half),
    )
    with finished(out) as folder:
        pipe.save_pretrained(folder)
        portable_tokenizers(folder, MAX_TOKENS, ("tokenizer", "tokenizer_2"))
        portable_names(folder / "text_encoder/model.safetensors")
        for encoder in ("text_encoder", "text_encoder_2"):
            # by default transformers 5 takes the stored half precision, but diffusers float32
            change_json(folder / encoder / "config.json", dtype="float32")
        write_json(folder / "limits.json", limits(tokenizer))


def main() -> None:
    assemble_command(__doc__, assemble, "work/tiny")


if __name__ == "__main__":
    main()
