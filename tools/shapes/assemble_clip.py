"""Put the trained CLIP baseline where it is bundled, in half precision.

    python tools/shapes/assemble_clip.py

Beside the weights stand the tokenizer and an image processor, which brings any picture to the size
that the model reads, with mean and deviation 0.5: `CLIPModel` and `CLIPProcessor` of transformers
load the folder.
"""

import argparse
import json
import shutil
from pathlib import Path

from assemble_lm import WEIGHTS, save_half

PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path("runs/shapes-clip"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/shapes/tokenizer"))
    parser.add_argument(
        "--target", type=Path, default=Path("src/diffenc/models/assets/shapes-clip")
    )
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    save_half(options.source / WEIGHTS, options.target / WEIGHTS)
    config = json.loads((options.source / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    # transformers 4 and 5 read the type of the weights by different names
    config["dtype"] = config["torch_dtype"] = "float32"
    write_json(options.target / "config.json", config)
    side = dict.fromkeys(("height", "width"), config["vision_config"]["image_size"])
    processor = {**PROCESSOR, "size": side, "crop_size": side}
    write_json(options.target / "preprocessor_config.json", processor)
    for name in TOKENIZER_FILES:
        shutil.copy(options.tokenizer / name, options.target)
    size = (options.target / WEIGHTS).stat().st_size
    print(f"{size / 1e6:.1f} MB of weights in {options.target}")


if __name__ == "__main__":
    main()
