"""Put the trained parts together as a diffusers folder (fp16) that `FluxPipeline.from_pretrained` loads.

    python -m analysis.tiny_flux.assemble --work work/tiny --out assets/tiny_flux

--work holds text_encoder, text_encoder_2, tokenizer, tokenizer_2 (from text_encoders), vae (from vae) and
checkpoint.pt (from train). Only the files of the pipeline and limits.json are written; others in --out stay.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

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


def portable_tokenizers(folder: Path) -> None:
    """transformers 5 writes the class as TokenizersBackend, unknown to 4.x; both know the Fast class.

    FluxPipeline reads the text length from model_max_length, and other lengths than the trained one change
    pictures.
    """
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for name in ("tokenizer", "tokenizer_2"):
        file = folder / name / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_TOKENS}
        file.write_text(json.dumps(config, indent=2) + "\n")


def portable_names(file: Path) -> None:
    """transformers 5 drops the prefix of CLIP's weights, without which 4.x silently draws them at random.

    Both know the names with it, which are those of the hub's checkpoints.
    """
    weights = {CLIP_PREFIX + k.removeprefix(CLIP_PREFIX): v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)


def forget_origin(config: Path) -> None:
    """diffusers stores the folder a part came from, which means nothing elsewhere."""
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2) + "\n")


def load_in_float32(config: Path) -> None:
    """By default transformers 5 takes the stored half precision, but diffusers float32: they must agree."""
    kept = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(kept, indent=2) + "\n")


def limits(tokenizer: PreTrainedTokenizerFast) -> dict:
    """What the model can be asked for, in the form the command line reads."""
    words = sorted(
        word for word in tokenizer.get_vocab() if len(word) > 1 and word.isalpha() and word.islower()
    )
    return {
        "height": [128],
        "width": [128],
        "quoted_word": "[A-Z]{1,5}",
        "vocabulary": ["a", *words],
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
    with tempfile.TemporaryDirectory() as scratch:  # a half-written folder must never be taken for a model
        folder = Path(scratch) / "model"
        pipe.save_pretrained(folder)
        portable_tokenizers(folder)
        portable_names(folder / "text_encoder/model.safetensors")
        forget_origin(folder / "vae/config.json")
        for encoder in ("text_encoder", "text_encoder_2"):
            load_in_float32(folder / encoder / "config.json")
        (folder / "limits.json").write_text(json.dumps(limits(tokenizer), indent=2) + "\n")
        shutil.copytree(folder, out, dirs_exist_ok=True)


def command(doc: str, assemble: Callable[[Path, Path], None], work: str) -> None:
    """The command line of an `assemble`; `doc`: what it does, `work`: its folder of trained parts."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    assemble(args.work, args.out)
    total = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {total:,} bytes")


def main() -> None:
    command(__doc__, assemble, "work/tiny")


if __name__ == "__main__":
    main()
