"""Forks of LLaVA on diffenc's tower: the guide's lines, the fork's own classes, a CPU.

    python tests/forks_run.py <folder of checkouts> ask|train [fork ...]

"ask" builds a model of the fork's own classes, trains it for three steps, asks it, saves it and
loads it; "train" runs the fork's own `train()`. Each fork runs in a process of its own. What was
found is printed as one line of JSON a fork.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

import cpu_torchvision  # noqa: F401  # before all that imports torchvision
import fork_world
from diffenc.hosts.installed_towers import towers_of
from diffenc.hosts.llava import take_prompts
from diffenc.hosts.prompts import prompt_scope
from diffenc.shapes import render, sample_scenes
from fork_recipes import FORKS, Fork

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "host-recipes.md"


def blocks(title: str) -> list[str]:
    """Code of a fork's section in the guide."""
    text = GUIDE.read_text("utf-8")
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section is not None, f"the guide has no section {title!r}"
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S)


class Trial:
    """A fork's model, and pictures and questions for it."""

    def __init__(self, fork: Fork, model: Any) -> None:
        self.fork = fork
        self.model = take_prompts(model).eval()
        self.tower = next(towers_of(model))
        self.tower.load_model()
        pictures = [render(scene) for scene in sample_scenes(2, seed=3)]
        self.pixels = self.tower.image_processor(pictures, return_tensors="pt")["pixel_values"]
        self.questions = self.tower.tokenize(fork_world.QUESTIONS)
        self.ids = torch.tensor([[1, -200, 5, 6]])

    def call(self, pictures: list[int], questions: list[int], **more: Any) -> Any:
        tokens = self.questions.take(questions)
        ids = self.ids.repeat(len(pictures), 1)
        return self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            images=self.fork.shown(self.pixels[pictures]),
            vision_prompt_ids=tokens.ids,
            vision_prompt_mask=tokens.mask,
            **self.fork.call(len(pictures)),
            **more,
        )

    @torch.no_grad()
    def logits(self, pictures: list[int], questions: list[int]) -> torch.Tensor:
        return self.call(pictures, questions).logits

    def generate(self, question: int) -> list[int]:
        tokens = self.questions.take([question])
        out = self.model.generate(
            self.ids,
            images=self.fork.shown(self.pixels[:1]),
            vision_prompt_ids=tokens.ids,
            vision_prompt_mask=tokens.mask,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            **self.fork.call(1),
        )
        return out[0].tolist()


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def train_step(trial: Trial) -> dict[str, float]:
    model = trial.model.train()
    for weight in trial.tower.adapter.parameters():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([[-100, -100, 5, 6]] * 2)
    losses = []
    for _ in range(3):
        loss = trial.call([0, 1], [0, 1], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    model.eval()
    return {"first loss": losses[0], "last loss": losses[-1], "adapter moved": moved(trial.tower)}


def moved(tower: Any) -> float:
    """Largest of the adapter's weights that are zeros in a new one."""
    weights = tower.adapter.named_parameters()
    return max(float(weight.abs().max()) for name, weight in weights if name.endswith("_up"))


def come_back(trial: Trial, folder: Path) -> dict[str, Any]:
    """What a saved model is like once the fork has loaded it."""
    target = folder / trial.fork.name
    trial.model.save_pretrained(target)
    trial.tower.image_processor.save_pretrained(target)
    fork_world.tokenizer().save_pretrained(target)
    trial.tower.save_adapter(target)
    again = type(trial)(trial.fork, trial.fork.loaded(target))
    weights, loaded = (t.state_dict() for t in (trial.tower, again.tower))
    return {
        "adapter after loading": max(apart(weights[key], loaded[key]) for key in weights),
        "logits after loading": apart(trial.logits([0], [0]), again.logits([0], [0])),
    }


class PrismaticTrial(Trial):
    """Prismatic, to which prompts go in `pixel_values`."""

    def __init__(self, fork: Fork, model: Any) -> None:
        self.fork, self.model, self.tower = fork, model.eval(), model.vision_backbone.featurizer
        self.pictures = [render(scene) for scene in sample_scenes(2, seed=3)]
        self.ids = torch.tensor([[1, 5, 6]])
        model.freeze_backbones("full-finetune")

    def call(self, pictures: list[int], questions: list[int], **more: Any) -> Any:
        transform = self.model.vision_backbone.image_transform
        shown = [
            transform(self.pictures[picture], fork_world.QUESTIONS[question])
            for picture, question in zip(pictures, questions, strict=True)
        ]
        ids = self.ids.repeat(len(pictures), 1)
        if "labels" in more:
            more["labels"] = more["labels"][:, 1:]
        return self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids).bool(),
            pixel_values={key: torch.stack([each[key] for each in shown]) for key in shown[0]},
            **more,
        )

    def generate(self, question: int) -> list[int]:
        with prompt_scope(fork_world.QUESTIONS[question]):
            return self.model.generate(self.pictures[0], "what", max_new_tokens=5, do_sample=False)


def ask(fork: Fork, report: dict[str, Any], folder: Path) -> None:
    """A model of the fork, trained for three steps, asked, saved and loaded."""
    run_block(fork, 0)
    report["imported"] = True
    kind = PrismaticTrial if fork.package == "prismatic" else Trial
    trial = kind(fork, fork.model(folder))
    report |= train_step(trial)
    report["same question"] = apart(trial.logits([0], [0]), trial.logits([0], [0]))
    report["other question"] = apart(trial.logits([0], [0]), trial.logits([0], [1]))
    both = trial.logits([0, 1], [0, 1])
    report["batch against singles"] = max(
        apart(both[row], trial.logits([row], [row])[0]) for row in (0, 1)
    )
    if fork.generates:
        report["answers repeat"] = trial.generate(0) == trial.generate(0)
    if fork.loads:
        report |= come_back(trial, folder)


VERSIONS = f"transformers {transformers.__version__}, diffusers {version('diffusers')}"
TRAINING = """
    --model_name_or_path {folder}/{base} --version plain --vision_tower {tower}
    --data_path {folder}/data.json --image_folder {folder}/images --output_dir {folder}/{name}
    --mm_projector_type mlp2x_gelu --per_device_train_batch_size 4 --max_steps 4
    --learning_rate 1e-2 --use_cpu True --bf16 False --model_max_length 256 --logging_steps 1
    --save_strategy no --report_to none
"""


def train(fork: Fork, report: dict[str, Any], folder: Path) -> None:
    """The fork's own `train()`, and what it saved."""
    run_block(fork, 0)
    report["imported"] = True
    fork_world.write_base(folder / fork.base, *fork.kinds, **fork.options)
    fork_world.write_data(folder)
    line = TRAINING.format(folder=folder, tower=fork_world.TOWER, name=fork.name, base=fork.base)
    sys.argv = ["train.py", *line.split(), *(fork.training or "").split()]
    run_block(fork, 1)
    saved = folder / fork.name
    report["saved"] = sorted(each.name for each in saved.iterdir() if each.is_file())
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    report["losses"] = [entry["loss"] for entry in history if "loss" in entry]
    tower = next(towers_of(fork.loaded(saved)))
    loaded = dict(tower.adapter.named_parameters())
    report["adapter moved"] = moved(tower)
    report["adapter after loading"] = max(
        apart(value, loaded[key.removeprefix("adapter.")])
        for key, value in load_file(saved / "diffenc_adapter.safetensors").items()
    )


def run_block(fork: Fork, index: int) -> None:
    """Run the lines of the guide."""
    code = compile(blocks(fork.title)[index], f"{GUIDE.name}: {fork.title}", "exec")
    exec(code, {"__name__": "recipe"})


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty packages for those that only a fork's other towers import."""

    def __init__(self, names: Any) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: Any) -> None:
        pass


def run_one(label: str, checkout: str, what: str) -> dict[str, Any]:
    """What one fork does here, or what stopped it."""
    fork = next(each for each in FORKS if each.called == label)
    sys.path.insert(0, checkout)
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None  # LLaVA-NeXT waits for a GPU before it saves
    sys.meta_path.append(Absent(fork.absent))
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            {"ask": ask, "train": train}[what](fork, report, Path(folder))
    except BaseException as error:  # a fork's own code: it may exit, too
        report["stopped"] = f"{type(error).__name__}: {error}"
        report["trace"] = traceback.format_exc()[-1500:]
    return report


def run(label: str, checkout: Path, what: str) -> dict[str, Any]:
    """`run_one` in a process of its own."""
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, __file__, "--one", label, str(checkout), what],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        report = {"stopped": done.stderr[-1500:]}
    return report


def main(hosts: str, what: str, *labels: str) -> None:
    for fork in FORKS:
        label, checkout = fork.called, Path(hosts) / fork.folder
        if (labels and label not in labels) or not checkout.is_dir():
            continue
        if what == "train" and fork.training is None:
            continue
        report = {"fork": label, "commit": fork.commit, "versions": VERSIONS, "what": what}
        report |= run(label, checkout, what)
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        result = run_one(*sys.argv[2:])
        sys.__stdout__.write("\n" + json.dumps(result) + "\n")  # type: ignore[union-attr]
    else:
        main(*sys.argv[1:])
