"""LLaVA's own code on diffenc's tower, with a tiny language model on the CPU.

    python tests/llava_run.py <LLaVA checkout> <empty folder>

Trains stage 1, stage 2 with LoRA and stage 2 in full by LLaVA's `train()`, loads both by its
`load_pretrained_model`, and generates. What was found is printed as one line of JSON. What makes
LLaVA run under the installed transformers is `modernize`, and nothing beside it.
"""

import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import fork_world
from diffenc.evals.hosted_vlm import HostedVLM
from diffenc.hosts.llava import modernize, register, take_prompts, train_with_prompts
from diffenc.hosts.prompts import prompt_scope
from fork_world import QUESTIONS, TOWER


def train(folder: Path, out: str, *options: str) -> Any:
    import llava.train.train as script

    models: list[Any] = []
    original = script.LLaVATrainer.train

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        models.append(self)
        return original(self, *args, **kwargs)

    script.LLaVATrainer.train = noted
    line = f"""
        --model_name_or_path {folder / "base"} --version plain --vision_tower {TOWER}
        --data_path {folder / "data.json"} --image_folder {folder / "images"}
        --output_dir {folder / out} --mm_projector_type mlp2x_gelu --mm_use_im_start_end False
        --mm_use_im_patch_token False --per_device_train_batch_size 4 --max_steps 4
        --learning_rate 1e-2 --use_cpu True --bf16 False --model_max_length 256
        --logging_steps 1 --save_strategy no --report_to none
    """
    sys.argv = ["train.py", *line.split(), *options]
    try:
        script.train()
    finally:
        script.LLaVATrainer.train = original
    return models[0]


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    tower = model.get_vision_tower()
    return {name: value.detach().clone() for name, value in tower.state_dict().items()}


def equal(left: Any, right: Any, tolerance: float = 0.0) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[key].float(), right[key].float(), atol=tolerance) for key in left
    )


def load(folder: Path, name: str, base: Path | None) -> Any:
    from llava.model import builder

    _, model, processor, _ = builder.load_pretrained_model(
        str(folder / name), None if base is None else str(base), name, device="cpu"
    )
    return model.float().eval(), processor


def generate(model: Any, folder: Path) -> dict[str, Any]:
    """What the loaded model gives for questions asked in all the ways there are."""
    from llava.mm_utils import process_images
    from PIL import Image

    take_prompts(model)
    tower = model.get_vision_tower()
    pictures = [Image.open(folder / "images" / f"{index}.png") for index in range(4)]
    shown = process_images(pictures, tower.image_processor, model.config)
    ids = torch.tensor([[1, -200, 5, 6]])
    questions = tower.tokenize(QUESTIONS)
    found: dict[str, Any] = {}

    def states(rows: Any, images: Any, tokens: Any, mask: Any = None) -> torch.Tensor:
        with torch.no_grad():
            out = model(
                rows,
                images=images,
                attention_mask=torch.ones_like(rows) if mask is None else mask,
                vision_prompt_ids=tokens.ids,
                vision_prompt_mask=tokens.mask,
            )
        return out.logits

    one, same = (states(ids, shown[:1], questions.take([0])) for _ in range(2))
    other = states(ids, shown[:1], questions.take([1]))
    found["same question"] = float((one - same).abs().max())
    found["other question"] = float((one - other).abs().max())
    with prompt_scope(QUESTIONS[0]), torch.no_grad():
        scoped = model(ids, images=shown[:1]).logits
    found["scope"] = float((one - scoped).abs().max())
    # One image, text alone, two images: the stand-in image of the second belongs to it.
    rows = torch.tensor([[1, -200, 5, 6, 0], [1, 7, 8, 9, 5], [1, -200, 5, -200, 6]])
    mask = rows != 0
    images = torch.stack([shown[0], torch.zeros_like(shown[0]), shown[1], shown[2]])
    tokens = tower.tokenize([QUESTIONS[0], "", QUESTIONS[1]])
    batch = states(rows, images, tokens, mask)
    alone = [
        states(rows[:1, :4], images[:1], tokens.take([0])),
        states(rows[1:2], images[1:2], tokens.take([1])),
        states(rows[2:], images[2:], tokens.take([2])),
    ]
    found["mixed batch"] = max(
        float((batch[row, : part.shape[1]] - part[0]).abs().max()) for row, part in enumerate(alone)
    )
    tiles = [shown[:2], shown[2:3]]
    both = states(ids.repeat(2, 1), tiles, questions, torch.ones(2, 4))
    each = states(ids, [shown[:2]], questions.take([0]))
    found["tiles"] = float((both[0, : each.shape[1]] - each[0]).abs().max())
    for beams in (1, 3):
        texts = []
        for row in (0, 0, 1):
            out = model.generate(
                ids,
                images=shown[:1],
                vision_prompt_ids=questions.ids[row : row + 1],
                vision_prompt_mask=questions.mask[row : row + 1],
                max_new_tokens=5,
                num_beams=beams,
                do_sample=False,
                pad_token_id=0,
            )
            texts.append(out[0].tolist())
        found[f"beams {beams} repeat"] = texts[0] == texts[1]
        found[f"beams {beams} tokens"] = texts[0]
    return found


def answer(folder: Path, name: str, base: Path | None) -> dict[str, Any]:
    """What the plug-in for lmms-eval makes of a checkpoint: answers, and prompts of its tower."""
    from PIL import Image

    from diffenc.evals.lmms_eval.opening import open_model

    options = {} if base is None else {"model_base": str(base)}
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    model: Any = open_model(str(folder / name), guidance_scale=3, **place, **options)
    pictures = [Image.open(folder / "images" / f"{index}.png") for index in range(3)]
    shown = [pictures[:1], pictures[1:], []]
    texts = [f"<image>\n{QUESTIONS[0]}", f"<image>\n<image>\n{QUESTIONS[1]}", "how many stars"]
    turns = [[{"from": "human", "value": text}] for text in texts]
    prompts, rows = [*QUESTIONS, ""], []
    features = model.tower._features

    def noted(images: Any, tokens: Any) -> Any:
        rows.append(tokens)
        return features(images, tokens)

    model.tower._features = noted
    call = {"max_new_tokens": 6, "do_sample": False}
    batch = model.generate(shown, turns, prompts, **call)
    report = {"batch": batch, "scale": model.tower.encoder.config.guidance_scale}
    expected = model.tower.tokenize([QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]])
    report["prompts"] = bool(torch.equal(rows[0].ids, expected.ids))
    report["alone"] = [
        model.generate([shown[row]], [turns[row]], [prompts[row]], **call)[0] for row in range(3)
    ]
    hosted = HostedVLM(folder / name, max_new_tokens=6).guided(3)
    report["evaluate"] = hosted.answer(shown[:1], QUESTIONS[:1], QUESTIONS[:1])
    return report


def start_examples(folder: Path, checkout: str) -> dict[str, list[str]]:
    """What the scripts of `examples/llava` write, on this model and data and on the CPU."""
    here = f"""
        --deepspeed= --model_name_or_path {folder / "base"} --data_path {folder / "data.json"}
        --image_folder {folder / "images"} --use_cpu True --bf16 False --tf32 False
        --per_device_train_batch_size 4 --max_steps 2 --save_steps 1 --model_max_length 256
        --dataloader_num_workers 0
    """
    environment = {
        **os.environ,
        "LAUNCH": sys.executable,
        "TOWER": TOWER,
        "DIFFENC_ATTENTION": "eager",
        "PYTHONPATH": os.pathsep.join([checkout, os.environ.get("PYTHONPATH", "")]),
    }
    written = {}
    for name, target in (("pretrain", "-pretrain"), ("finetune", ""), ("finetune_lora", "-lora")):
        script = Path(__file__).parents[1] / "examples" / "llava" / f"{name}.sh"
        command = ["bash", str(script), *here.split()]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        saved = folder / "checkpoints" / f"llava-diffenc{target}"
        written[name] = sorted(each.name for each in saved.iterdir())
    return written


def main(checkout: str, target: str) -> None:
    sys.path.insert(0, checkout)
    warnings.simplefilter("ignore")
    folder = Path(target)
    supplied = modernize("llava").supplied
    register("llava")
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    options = {"vocab_size": 128, "pad_token_id": None}
    fork_world.write_base(folder / "base", LlavaConfig, LlavaLlamaForCausalLM, **options)
    fork_world.write_data(folder)
    train_with_prompts("llava", "question")
    report: dict[str, Any] = {"transformers": transformers.__version__, "supplied": supplied}
    stage1 = train(folder, "llava-stage1", "--tune_mm_mlp_adapter", "True")
    report["stage 1 losses"] = losses(stage1)
    projector = folder / "llava-stage1" / "mm_projector.bin"
    report["stage 1 saved"] = sorted(torch.load(projector, weights_only=True))
    start = ["--pretrain_mm_mlp_adapter", str(projector)]
    lora = train(folder, "llava-lora", *start, "--lora_enable", "True", "--lora_r", "2")
    report["lora losses"] = losses(lora)
    weights = torch.load(folder / "llava-lora" / "non_lora_trainables.bin", weights_only=True)
    report["lora saved adapter"] = sum("vision_tower.adapter" in key for key in weights)
    full = train(folder, "llava-full", *start)
    report["full losses"] = losses(full)
    trained = {"llava-lora": adapter_of(lora.model), "llava-full": adapter_of(full.model)}
    for name, base in (("llava-lora", folder / "base"), ("llava-full", None)):
        report[f"{name} adapter moved"] = max(
            float(value.abs().max()) for key, value in trained[name].items() if "_up" in key
        )
        model, _ = load(folder, name, base)
        report[f"{name} reloaded"] = equal(adapter_of(model), trained[name], 1e-3)
        report[name] = generate(model, folder)
        report[f"{name} answers"] = answer(folder, name, base)
        tower = model.get_vision_tower()
        report[f"{name} side file"] = tower.load_adapter(
            folder / name / "diffenc_adapter.safetensors"
        )
        report[f"{name} side file equal"] = equal(adapter_of(model), trained[name])
    plain = types.SimpleNamespace(vision_tower="nobody/knows")
    from llava.model.multimodal_encoder.builder import build_vision_tower

    try:
        build_vision_tower(plain)
    except ValueError as error:
        report["other towers"] = str(error)
    report["examples"] = start_examples(folder, checkout)
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
