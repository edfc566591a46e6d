"""Whether LoRA alone grounds the colour words of `shapes`, which its training left to themselves.

    python tools/shapes/ground_lora.py --scenes 2400 --epochs 2

`diffenc train` with stage = "ground" on scenes of three objects of three colours and three shapes,
from boxes. Measured before and after, on held-out scenes, by the functions of `measure_crowds.py`.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch
from measure_crowds import BATCH, TAPS, Asked, changes, maxima, of_best, one_token
from training import HELD_OUT_SEED, VALIDATION_SEED

from diffenc import DiffusionEncoder, EncoderConfig
from diffenc.grounding.loss import TIMESTEPS
from diffenc.mllm.training import (
    AdaptConfig,
    DataConfig,
    GroundConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    train,
)
from diffenc.shapes import render
from diffenc.shapes.phrases import named_boxes, scene_text
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, SceneObject, sample_scene

SIZE = 64


def scene_of_three(rng: random.Random) -> Scene:
    """Three objects that differ in colour and in shape, so that one trait names each."""
    kinds = list(zip(rng.sample(COLORS, 3), rng.sample(SHAPES, 3), strict=True))
    return sample_scene(rng, kinds=kinds)


def asked_of(count: int, seed: int) -> list[Asked]:
    rng = random.Random(f"ground-lora/{seed}")
    return [Asked(scene_of_three(rng), *rng.sample(range(3), 2)) for _ in range(count)]


def _word(word: str, thing: SceneObject) -> str:
    """The object's own colour or shape, or the word itself."""
    own: str = getattr(thing, word, word)
    return own


MEASURES = ("change", "maximum", "token")


def measured(encoder: DiffusionEncoder, items: int, measures: list[str]) -> dict[str, object]:
    table: dict[str, object] = {}
    held_out = asked_of(items, HELD_OUT_SEED)
    if "change" in measures:
        table["change, color"] = changes(encoder, held_out, "color")
    for naming, word in (("color", "color"), ("color", "object"), ("shape", "shape")):
        if "maximum" in measures:
            chosen, shown = (
                maxima(encoder.backbone, trials, naming, partial(_word, word))
                for trials in (asked_of(items // 2, VALIDATION_SEED), held_out)
            )
            table[f"maximum on its object, {naming}, by {word}"] = of_best(chosen, shown)
        if "token" in measures and naming == "color":
            trials = asked_of(3 * items, HELD_OUT_SEED)
            table[f"one token, color, by {word}"] = one_token(
                encoder, trials, naming, partial(_word, word)
            )
    return table


def write_phrases(folder: Path, count: int) -> None:
    """Scenes as pictures, and a text of each with the boxes of what its words name."""
    rng = random.Random("ground-lora/train")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene = scene_of_three(rng)
        render(scene, SIZE).save(folder / "images" / f"{index:05}.png")
        text = scene_text(scene, rng)
        phrases = named_boxes(scene, text, SIZE)
        lines.append({"image": f"{index:05}.png", "text": text, "phrases": phrases})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "phrases.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2400)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight", type=float, default=1.0, help="of the loss on the maps")
    parser.add_argument("--timesteps", type=int, nargs=2, default=TIMESTEPS)
    parser.add_argument("--layers", nargs="+", help="default: where word tokens are gathered")
    parser.add_argument("--items", type=int, default=80)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/ground-lora"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = options.output / "data"
    write_phrases(data, options.scenes)
    config = TrainConfig(
        stage="ground",
        output=str(options.output / "run"),
        model=ModelConfig(encoder="shapes", options={"taps": list(TAPS)}),
        data=DataConfig(check_images=False),
        ground=GroundConfig(
            annotations=str(data / "phrases.jsonl"),
            images=str(data / "images"),
            weight=options.weight,
            layers=options.layers and tuple(options.layers),
            timesteps=(options.timesteps[0], options.timesteps[1]),
        ),
        adapt=AdaptConfig(unet_rank=options.rank),
        optim=OptimConfig(
            learning_rate=options.lr,
            batch_size=options.batch,
            device_batch_size=options.batch,
            epochs=options.epochs,
            warmup=0.0,
            schedule="linear",
            precision="fp32",
            gradient_checkpointing=False,
        ),
        save_steps=0,
        log_steps=25,
    )
    read = EncoderConfig(taps=TAPS, timestep=50, batch_size=BATCH)
    results: dict[str, dict[str, object]] = {}
    for name in ("before", "after"):
        source: str | Path = "shapes" if name == "before" else train(config, device="cpu").model
        encoder = DiffusionEncoder.from_pretrained(source, **read.to_dict())
        results[name] = measured(encoder, options.items, options.measures)
        print(name, json.dumps(results[name]), flush=True)
        (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
