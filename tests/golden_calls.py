"""A set of calls whose outputs must stay as they are while the code behind them moves.

    python tests/golden_calls.py --write before.json    # on the old code
    python tests/golden_calls.py --compare before.json  # on the new: equal to the bit, or named

Digests compare two trees on one machine; `--summaries FILE` writes figures that hold on every one.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import builders

Outputs = dict[str, Tensor]
TEXTS = ["a red circle left of a blue square", "a photo of a circle"]
QUESTION = "what color is the circle?"


def pictures() -> list[Image.Image]:
    """Three pictures of other sizes and shapes, without a file."""
    from diffenc.shapes import render, sample_scenes

    scenes = list(sample_scenes(2, seed=0))
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (53, 87, 3), np.uint8))
    return [render(scenes[0]), render(scenes[1], 96), noise.resize((87, 53), Image.Resampling.BOX)]


class Models:
    """Models that several calls share, loaded when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tiny(self, kind: str) -> Path:
        """A folder with a tiny random model in the shape of a published one."""
        target = self.folder / kind
        if not target.exists():
            target.mkdir()
            builders.save_sdxl(target) if kind == "sdxl" else builders.save_sd(target, kind)
        return target

    def encoder(self, name: str, **options: Any) -> Any:
        """An encoder of `shapes`, or of a tiny model."""
        from diffenc import DiffusionEncoder

        source = "shapes" if name == "shapes" else self.tiny(name)
        return DiffusionEncoder.from_pretrained(source, **options)

    def scorer(self, name: str, **options: Any) -> Any:
        """A scorer of `shapes`, or of a tiny model."""
        from diffenc import CrossAttnScorer

        source = "shapes" if name == "shapes" else self.tiny(name)
        return CrossAttnScorer.from_pretrained(source, **options)


CALLS: dict[str, Callable[[Models], Outputs]] = {}


def call(name: str) -> Callable[[Callable[[Models], Outputs]], Callable[[Models], Outputs]]:
    """Add a function to the set."""

    def add(function: Callable[[Models], Outputs]) -> Callable[[Models], Outputs]:
        CALLS[name] = function
        return function

    return add


def _maps(features: Any) -> Outputs:
    return {**dict(features.items()), "tokens": features.tokens()}


for _conditioning in ("uncond", "cond", "cfg", "concat"):

    @call(f"features of shapes, {_conditioning}")
    def _shapes(models: Models, conditioning: str = _conditioning) -> Outputs:
        encoder = models.encoder("shapes")
        prompts = [QUESTION, *TEXTS]
        return {"tokens": encoder.extract(pictures(), prompts, conditioning=conditioning).tokens()}


for _kind in ("sd1.5", "sd2.1", "sdxl"):

    @call(f"features in the shape of {_kind}")
    def _family(models: Models, kind: str = _kind) -> Outputs:
        taps = ("up_blocks.0.attentions.0", "up_blocks.1.attentions.*") if kind == "sdxl" else None
        encoder = models.encoder(kind, size=(64, 96), taps=taps)
        features = encoder.extract(pictures(), QUESTION, conditioning="cfg", guidance_scale=4.0)
        unconditional = encoder.extract(pictures()[:1])
        return {**_maps(features), "unconditional": unconditional.tokens()}


@call("several timesteps, draws and a sampled posterior")
def _draws(models: Models) -> Outputs:
    encoder = models.encoder("shapes", timestep=(50, 261), draws=2, posterior="sample", seed=3)
    return _maps(encoder.extract(pictures()[:1], QUESTION))


for _resize in ("squash", "crop", "pad", "none"):

    @call(f"resize {_resize}")
    def _resized(models: Models, resize: str = _resize) -> Outputs:
        size = None if resize == "none" else (64, 96)
        return {"tokens": models.encoder("shapes", resize=resize, size=size)(pictures()[2])}


for _preset in ("gdf", "dift", "cleandift", "hyperfeatures"):

    @call(f"preset {_preset}")
    def _encoder_preset(models: Models, preset: str = _preset) -> Outputs:
        encoder = models.encoder("sd2.1", preset=preset, size=64)
        return _maps(encoder.extract(pictures()[:1], TEXTS[0]))


@call("long prompts in windows, truncated model, many taps")
def _long(models: Models) -> Outputs:
    options = {"taps": ("down_blocks.*", "mid_block", "up_blocks.1.attentions.0"), "size": 64}
    encoder = models.encoder("sdxl", truncate=True, long_prompts="chunk", **options)
    return _maps(encoder.extract(pictures()[0], "a red circle of blue squares " * 20))


@call("LoRA and captioner")
def _adapted(models: Models) -> Outputs:
    encoder = models.encoder("shapes")
    torch.manual_seed(0)
    encoder.add_lora(rank=2)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
    adapted = encoder(pictures()[0], QUESTION).detach()
    encoder.add_captioner("shapes-clip")
    return {"lora": adapted, "captioner": encoder(pictures()[0]).detach()}


@call("fused with CLIP, projected")
def _fused(models: Models) -> Outputs:
    from diffenc import FusedEncoder, projector_for

    fused = FusedEncoder("shapes-clip", models.encoder("shapes"))
    torch.manual_seed(0)
    projector = projector_for(fused, 32)
    tokens = fused(pictures()[:2], QUESTION)
    return {"projected": projector(tokens).detach()}


_PRESETS = ("calibrated", "paper", "discffusion", "diffusion-classifier", "diffusion-itm")
for _preset in _PRESETS:

    @call(f"scores by {_preset}")
    def _scores(models: Models, preset: str = _preset) -> Outputs:
        return {"scores": models.scorer("shapes", preset=preset)(pictures()[:2], TEXTS)}


@call("scores in the shape of SDXL")
def _sdxl_scores(models: Models) -> Outputs:
    return {"scores": models.scorer("sdxl", size=64)(pictures()[:2], TEXTS)}


@call("shared queries, a bank, and a search")
def _bank(models: Models) -> Outputs:
    scorer = models.scorer("shapes", mode="shared-query", timesteps=(189, 589))
    folder = Path(tempfile.mkdtemp(dir=models.folder)) / "bank"
    bank = scorer.build_index(pictures()[:2], folder, names=["a", "b"])
    return {"scores": scorer(pictures()[:2], TEXTS), "bank": bank.scores(TEXTS)}


@call("word maps")
def _word_maps(models: Models) -> Outputs:
    scorer = models.scorer("shapes")
    maps = scorer.word_maps(pictures()[0], TEXTS[0])
    daam = scorer.word_maps(pictures()[0], TEXTS[0], preset="daam")
    named = {"maps": maps, "daam": daam}
    return {
        f"{kind} {word}": torch.as_tensor(heat.array)
        for kind, maps in named.items()
        for word, heat in maps.items()
    }


@call("tower of LLaVA, with and without prompts")
def _tower(models: Models) -> Outputs:
    from importlib import import_module

    from diffenc import prompt_scope

    home = prompt_scope.__module__
    tower = import_module(f"{home.rpartition('.')[0]}.tower").DiffusionVisionTower(
        "diffenc:shapes?grid=4", args=None, delay_load=False
    )
    processor = tower.image_processor
    pixels = processor.preprocess(pictures()[:2], return_tensors="pt")["pixel_values"]
    plain = tower(pixels)
    with prompt_scope([QUESTION, TEXTS[0]]):
        questioned = tower(pixels)
    return {"plain": plain.detach(), "asked": questioned.detach()}


@call("training in miniature, two stages, and its evaluations")
def _training(models: Models) -> Outputs:
    root = Path(tempfile.mkdtemp(dir=models.folder))
    run_cli("shapes-data", root / "data", "--scenes", "24")
    outputs: Outputs = {}
    for stage, extra in (
        ("align", ""),
        ("instruct", f'start = "{root}/align/model"\n'),
    ):
        config = f"""stage = "{stage}"
output = "{root}/{stage}"
[model]
{extra}encoder = "shapes"
language_model = "shapes-lm"
template = "chat"
options = {{ conditioning = "cfg", guidance_scale = 1.5 }}
[data]
annotations = "{root}/data/{stage}.json"
images = "{root}/data/images"
prompts = "{"caption" if stage == "align" else "question"}"
max_length = 256
[optim]
batch_size = 8
device_batch_size = 8
epochs = 1
precision = "fp32"
gradient_checkpointing = false
"""
        if stage == "instruct":
            config += '[adapt]\nlanguage_model = "full"\nunet_rank = 2\n'
        (root / f"{stage}.toml").write_text(config, encoding="utf-8")
        run_cli("train", root / f"{stage}.toml", "--device", "cpu")
        lines = (root / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
        outputs[f"{stage}, loss"] = torch.tensor(losses, dtype=torch.float64)
    model = root / "instruct" / "model"
    for name, options in (("captions", ()), ("mmvp", ())):
        answers = root / f"{name}.jsonl"
        run_cli(
            "evaluate", name, model, "--data", "shapes", "--limit", "8", "-o", answers, *options
        )
        outputs[f"{name}, answers"] = _text(answers)
    return outputs


@call("benchmarks of matching in miniature")
def _matching(models: Models) -> Outputs:
    outputs: Outputs = {}
    for name in ("winoground", "mmvp-vlm"):
        text = run_cli(
            "evaluate", name, "--data", "shapes", "--per-label", "2", "--trials", "1",
            "--clip", "shapes-clip", "--json",
        )  # fmt: skip
        outputs[name] = _numbers(json.loads(text)["models"])
    return outputs


@call("commands that write files")
def _commands(models: Models) -> Outputs:
    root = Path(tempfile.mkdtemp(dir=models.folder))
    path = root / "picture.png"
    pictures()[0].save(path)
    run_cli("encode", path, "--prompt", QUESTION, "-o", root / "f.safetensors", "--tokens")
    scores = run_cli("score", path, "--text", TEXTS[0], "--text", TEXTS[1], "--json")
    info = json.loads(run_cli("info", "sdxl", "--json"))
    from safetensors.torch import load_file

    return {**load_file(root / "f.safetensors"), "scores": _numbers(json.loads(scores)),
            "info": _numbers(info)}  # fmt: skip


def run_cli(*arguments: object) -> str:
    """What a command prints."""
    from diffenc.cli.main import main

    before, sys.argv = sys.argv, ["diffenc", *map(str, arguments)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()) as err:
            main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{arguments}: {err.getvalue()}") from end
    finally:
        sys.argv = before
    return printed.getvalue()


def _numbers(value: Any) -> Tensor:
    """Every number in a JSON value, in order."""

    def walk(entry: Any) -> Iterator[float]:
        if isinstance(entry, dict):
            for key in sorted(entry):
                if not any(word in key for word in ("seconds", "time_", "version", "date")):
                    yield from walk(entry[key])
        elif isinstance(entry, list):
            for each in entry:
                yield from walk(each)
        elif isinstance(entry, (int, float)):
            yield float(entry)

    return torch.tensor(list(walk(value)), dtype=torch.float64)


def _text(path: Path) -> Tensor:
    """The answers in a file of JSON lines, as bytes."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    answers = [str(line.get("answer", line.get("caption", ""))) for line in lines]
    return torch.tensor(list("\n".join(answers).encode()), dtype=torch.uint8)


def digest(outputs: Outputs) -> str:
    """A digest of names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(outputs.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                      if tensor.numel() else b"")  # fmt: skip
    return digest.hexdigest()


def summary(outputs: Outputs) -> dict[str, Any]:
    """Per output its shape, largest magnitude, and three fixed projections of it."""
    summaries = {}
    for name, tensor in outputs.items():
        values = tensor.detach().double().flatten()
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(3, len(values), generator=generator, dtype=torch.float64)
        projected = (directions @ values / max(1, len(values)) ** 0.5).tolist()
        largest = float(values.abs().max()) if len(values) else 0.0
        summaries[name] = {
            "shape": list(tensor.shape),
            "largest": round(largest, 6),
            "projections": [round(value, 6) for value in projected],
        }
    return summaries


def run(only: str = "") -> Iterator[tuple[str, Outputs]]:
    """Run the calls whose name holds a text, one after the other."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # commands write there
        models = Models(Path(folder))
        for name, function in CALLS.items():
            if only in name:
                yield name, function(models)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="write digests to this file")
    parser.add_argument("--compare", type=Path, help="compare with digests of another tree")
    parser.add_argument("--summaries", type=Path, help="write summaries to this file")
    parser.add_argument("--only", default="", help="calls whose name holds this text")
    options = parser.parse_args()
    digests, summaries = {}, {}
    before = json.loads(options.compare.read_text(encoding="utf-8")) if options.compare else {}
    for name, outputs in run(options.only):
        digests[name], summaries[name] = digest(outputs), summary(outputs)
        state = "" if not before else "equal" if before.get(name) == digests[name] else "CHANGED"
        print(f"{digests[name][:12]} {state:8}{name}", flush=True)  # noqa: T201
    if options.write:
        options.write.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    if options.summaries:
        options.summaries.write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(before.get(name) != digests[name] for name in before if options.only in name))


if __name__ == "__main__":
    main()
