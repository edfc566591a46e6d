"""Put the trained parts together as the bundled diffusers folder, in half precision.

    python tools/shapes/assemble.py

The result is what `StableDiffusionPipeline.from_pretrained` reads. Weights are stored as float16;
the text encoder's config says float32, because transformers 5 would otherwise keep it in half while
diffusers brings the other parts to float32. Its keys carry the prefix `text_model.`, as published
Stable Diffusion folders have it: transformers 4 needs it, 5 accepts it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffenc.models.taps import derived_taps

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.32.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def copy_weights(source: Path, target: Path, part: str) -> None:
    """One part's weights as float16, and its config."""
    state = load_file(source / part / WEIGHTS[part])
    if part == "text_encoder":
        state = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in state.items()}
    halves = {
        key: value.to(torch.float16).contiguous() if value.is_floating_point() else value
        for key, value in state.items()
    }
    (target / part).mkdir(parents=True, exist_ok=True)
    save_file(halves, target / part / WEIGHTS[part], metadata={"format": "pt"})
    (target / part / WEIGHTS[part]).chmod(0o644)
    config = json.loads((source / part / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    if part == "text_encoder":
        config["dtype"] = config["torch_dtype"] = "float32"
        config["model_type"] = "clip_text_model"
    write_json(target / part / "config.json", config)


def write_taps(folder: Path) -> None:
    """Beside the default model, channels and reduction of every readable place of its U-Net."""
    config = (folder / "unet" / "config.json").read_text(encoding="utf-8")
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    taps = derived_taps(config, 2 ** (len(vae["block_out_channels"]) - 1))
    rows = [f"  {json.dumps(tap.name)}: [{tap.channels}, {tap.reduction}]" for tap in taps]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    (folder.parent / f"{folder.name}-taps.json").write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--target", type=Path, default=Path("src/diffenc/models/assets/shapes"))
    options = parser.parse_args()
    for part in WEIGHTS:
        copy_weights(options.source, options.target, part)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(options.source / part, options.target / part, dirs_exist_ok=True)
    write_json(options.target / "model_index.json", INDEX)
    if options.target.name == "shapes":
        write_taps(options.target)
    total = sum(file.stat().st_size for file in options.target.rglob("*.safetensors"))
    print(f"{total / 1e6:.1f} MB of weights in {options.target}")


if __name__ == "__main__":
    main()
