"""Put the trained parts together as a diffusers folder that `WanPipeline.from_pretrained` loads.

    python -m analysis.tiny_wan.assemble --work work/wan --out assets/tiny_wan

--work holds text_encoder and tokenizer (from text_encoder), vae_checkpoint.pt (from vae) and checkpoint.pt
(from train); what these two write as --export will do.
Only the files of the pipeline and limits.json are written; others in --out stay.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from analysis.tiny_flux.assemble import command, forget_origin
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


def portable_tokenizer(folder: Path) -> None:
    """transformers 5 writes the class as TokenizersBackend, unknown to 4.x; both know the Fast class."""
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    file = folder / "tokenizer/tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
    file.write_text(json.dumps(config, indent=2) + "\n")


def limits(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the model can be asked for, in the form the command line reads."""
    words = sorted(
        word for word in tokenizer.get_vocab() if len(word) > 1 and word.isalpha() and word.islower()
    )
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
        "vocabulary": ["a", *words],
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
    with tempfile.TemporaryDirectory() as scratch:  # a half-written folder must never be taken for a model
        folder = Path(scratch) / "model"
        pipe.save_pretrained(folder)
        portable_tokenizer(folder)
        forget_origin(folder / "vae/config.json")
        (folder / "limits.json").write_text(json.dumps(limits(tokenizer), indent=2) + "\n")
        shutil.copytree(folder, out, dirs_exist_ok=True)


def main() -> None:
    command(__doc__, assemble, "work/wan")


if __name__ == "__main__":
    main()
