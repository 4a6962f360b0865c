"""Put the trained parts together as a diffusers folder that `WanPipeline.from_pretrained` loads.

    python -m analysis.tiny_wan.assemble --work work/wan --out assets/tiny_wan

--work holds text_encoder and tokenizer (from text_encoder), vae_checkpoint.pt (from vae) and checkpoint.pt
(from train); what these two write as --export will do.
Only the files of the pipeline and limits.json are written; others in --out stay.
"""

from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from analysis.recipes import assemble_command, finished, known_words, portable_tokenizers, write_json
from analysis.tiny_wan.clips import BAD, FRAMES, SIZE
from analysis.tiny_wan.model import load_transformer
from analysis.tiny_wan.text_encoder import MAX_TOKENS
from analysis.tiny_wan.vae import load_vae

STEPS, GUIDANCE = 50, 3.0
EXAMPLE = "a red circle moves left over a green background"


def scheduler() -> UniPCMultistepScheduler:
    """Wan 2.1's own, with the shift its authors give for small frames."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def limits(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the model can be asked for, in the form the command line reads."""
    return {
        "height": [SIZE],
        "width": [SIZE],
        "call": {
            "num_frames": FRAMES,
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "negative_prompt": BAD,
            "max_sequence_length": MAX_TOKENS,
        },
        "word": "[A-Z]{1,4}",
        "vocabulary": known_words(tokenizer),
        "example": EXAMPLE,
        "cpu_threads": 1,  # so small a model only loses by sharing its work
    }


def assemble(work: Path, out: Path) -> None:
    """Half precision for transformer and VAE, which diffusers loads as float32 when nothing is asked for.

    The text encoder is stored in single precision: transformers 5 keeps the stored one, 4.x does not.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel.from_pretrained(work / "text_encoder", dtype=torch.float32),
        vae=load_vae(work / "vae_checkpoint.pt").half(),
        scheduler=scheduler(),
        transformer=load_transformer(work / "checkpoint.pt").half(),
    )
    with finished(out) as folder:
        pipe.save_pretrained(folder)
        portable_tokenizers(folder, MAX_TOKENS, ["tokenizer"])
        write_json(folder / "limits.json", limits(tokenizer))


def main() -> None:
    assemble_command(__doc__, assemble, "work/wan")


if __name__ == "__main__":
    main()
