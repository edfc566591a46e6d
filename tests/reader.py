"""A reader's desk: what the code of pages needs around it, in small.

Pages name models of the Hub, files of the reader's own and a GPU. Here the Hub's ids lead to tiny
models of the same families, the files lie in the working directory, and the GPU is the CPU. The
code of a page is what stands on it, from an empty namespace on; only pages about another program
get the objects of that program.
"""

import doctest
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers import trainer as transformers_trainer
from typer.testing import CliRunner

import answers_data
import builders
import evals_data
import ldm_layout
import tiny_llava
import toy_llava
from diffenc import DiffusionEncoder, DiffusionVLM, load_backbone
from diffenc.cli.app import app
from diffenc.evals.llava_bench import FunctionJudge
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.shapes import render, sample_scenes

ROOT = Path(__file__).parents[1]
SNIPPET = re.compile(r'^--8<-- "(?P<path>[^":]+)(?::\S+)?"\n?', flags=re.MULTILINE)
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>python|pycon)[^\n]*\n(?P<code>.*?)^ *```$",
    flags=re.MULTILINE | re.DOTALL,
)
HARDWARE = (
    ('device="cuda"', 'device="cpu"'),
    ("torch.float16", "torch.float32"),
    (".cuda()", ""),
    ("num_workers=2", "num_workers=0"),
    ('.to("cuda")', ""),
    ('architecture="sd2.1"', 'architecture="models/sd21"'),
    ('"sd2.1",\n    preset="cleandift"', '"models/sd21",\n    preset="cleandift"'),
    ('"sdxl", vae=', '"models/sdxl", vae='),
)
"""What a machine without a GPU, and a file of tiny weights, take in place of what a page says."""

AMOUNTS = (
    ("scenes=300, seeds=5", "scenes=30, seeds=1, focus_scenes=4, timesteps=[50]"),
    ("shapes_captions(200)", "shapes_captions(4)"),
    ('study_leakage_readout("shapes"', 'study_leakage_readout("shapes", scenes=36, seeds=1'),
    ("for s in (1, 1.5, 4.5, 7)", "for s in (1, 4.5)"),
    ("per_label=5", "per_label=1"),
)
"""What takes minutes in the numbers that a page gives, and seconds in these."""

ENGINES = ("daft", "datasets", "pyspark", "ray")
"""Packages of many megabytes: where one is not installed, the blocks that import it are not run."""


class Hub:
    """Folders of tiny models, made when a page first asks for one of their family."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, hub_id: str, *_args: Any, **_options: Any) -> Path:
        """Folder of the model that stands for a Hub id."""
        name = hub_id.lower()
        if "clip" in name:
            return Path(str(files("diffenc") / "models" / "assets" / "shapes-clip"))
        target = self._root / hub_id.replace("/", "--")
        if not target.exists():
            if "xl" in name:
                builders.save_sdxl(target, depth=8)  # its preset reads block 7
            else:
                kind: Any = next(
                    kind
                    for kind, part in (
                        ("sd1.5", "v1-5"),
                        ("sd2.1-base", "2-1-base"),
                        ("sd2.1", "2-1"),
                    )
                    if part in name
                )
                builders.save_sd(target, kind)
        return target


def lay_out(folder: Path) -> None:
    """Write the pictures that pages name."""
    names = ("photo.jpg", "other.jpg", "horse.png", "cat.png")
    for name, scene in zip(names, sample_scenes(4, seed=0), strict=True):
        render(scene, 96).save(folder / name)
    (folder / "photos").mkdir()
    for index, scene in enumerate(sample_scenes(6, seed=1)):
        render(scene).save(folder / "photos" / f"{index}.jpg")


@contextmanager
def desk(hub: Hub) -> Iterator[None]:
    """Small models for the Hub's ids, a judge that needs no service, and a fork of LLaVA."""
    with ExitStack() as stack:
        stack.callback(_end_ray)
        stack.enter_context(patch.dict(sys.modules))
        stack.enter_context(patch.dict(vars(transformers_trainer)))
        for kind in (toy_llava.ToyLlava, toy_llava.ToyTrainer):
            stack.enter_context(_left_as_it_was(kind))
        stack.enter_context(torch.random.fork_rng())
        for place in ("models.sources", "storage.pretrained"):
            stack.enter_context(patch(f"diffenc.{place}.hub_folder", hub.folder))
        stack.enter_context(patch("diffenc.evals.llava_bench.OpenAIJudge", _judge))
        fork = stack.enter_context(toy_llava.toy_package("llava"))
        _give_script(fork.script)
        yield


def _end_ray() -> None:
    """End Ray where a page began it, as it ends with a reader's program."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def _give_script(script: Any) -> None:
    """The training script of a fork."""
    script.LLaVATrainer = _ForkTrainer
    script.TrainingArguments = type("TrainingArguments", (TrainingArguments,), {})
    script.HfArgumentParser = HfArgumentParser
    exec(FORK_TRAIN, vars(script))


@contextmanager
def _left_as_it_was(kind: type) -> Iterator[None]:
    """A class whose attributes come back."""
    before = dict(vars(kind))
    yield
    for name, value in {**dict(vars(kind)), **before}.items():
        if name not in before:
            delattr(kind, name)
        elif vars(kind)[name] is not value:
            setattr(kind, name, value)


FORK_TRAIN = """
def train():
    HfArgumentParser(TrainingArguments)
    return LLaVATrainer(**make_supervised_data_module([]))
"""


class _ForkTrainer(toy_llava.ToyTrainer, Trainer):
    """A trainer of the kind that `modernize` looks for."""


def _judge(model: str, **_options: Any) -> FunctionJudge:
    return FunctionJudge(model, lambda _prompt: "10 5")


def _models(hub: Hub) -> None:
    """Folders and files of models, by the names of "Loading models" and "Installation"."""
    Path("models/sd15").symlink_to(hub.folder("v1-5"))
    Path("models/sdxl").symlink_to(hub.folder("xl"))
    sd21 = hub.folder("stable-diffusion-2-1")
    Path("models/sd21").symlink_to(sd21)
    Path("tokenizers/clip").symlink_to(sd21 / "tokenizer")
    backbone = load_backbone(sd21)
    save_file(backbone.unet.state_dict(), "cleandift_sd21_unet.safetensors")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained("models/taesdxl")
    text = ldm_layout.openclip_in_original_layout(
        backbone.text_encoder.state_dict(), extra_layer=True
    )
    unet, vae = backbone.unet.state_dict(), backbone.vae.state_dict()
    state = {
        **ldm_layout.prefixed("model.diffusion_model.", ldm_layout.unet_in_original_layout(unet)),
        **ldm_layout.prefixed("first_stage_model.", ldm_layout.vae_in_original_layout(vae)),
        **ldm_layout.prefixed("cond_stage_model.model.", text),
    }
    whole = {name: value.contiguous().clone() for name, value in state.items()}
    save_file(whole, "v2-1_768-ema-pruned.safetensors")


def _trained_models() -> None:
    for number, scene in enumerate(sample_scenes(2, seed=0)):
        Path("shapes-llava/images").mkdir(parents=True, exist_ok=True)
        render(scene).save(f"shapes-llava/images/{number:06}.png")
    for name in ("shapes-instruct", "dropout"):
        DiffusionVLM("shapes", "shapes-lm").save_pretrained(f"runs/{name}/model")


def _grounded_model() -> None:
    grounded = DiffusionEncoder.from_pretrained("shapes")
    grounded.add_lora(rank=4)
    grounded.save_pretrained("runs/shapes-ground/model")


def _features() -> None:
    done = CliRunner().invoke(app, ["encode", "photo.jpg", "-o", "features.safetensors"])
    assert done.exit_code == 0, done.output


def _answers() -> None:
    _trained_models()
    answers_data.karpathy(Path("coco/images"))
    Path("coco/images/dataset_coco.json").rename("dataset_coco.json")
    answers_data.mmvp(Path("MMVP"))
    answers_data.llava_bench(Path("llava-bench-in-the-wild"))


def _benchmarks() -> None:
    rows = evals_data.winoground_rows(evals_data.picture)
    stub: Any = types.ModuleType("datasets")
    stub.load_dataset = lambda name: {"test": rows}
    sys.modules["datasets"] = stub
    torch.save({"weight": torch.zeros(2)}, "DFN/open_clip_pytorch_model.bin")


class _Probe:
    """A linear classifier with scikit-learn's face, where that is not installed."""

    def __init__(self, max_iter: int) -> None:
        self._iterations = max_iter

    def fit(self, features: Any, labels: Any) -> "_Probe":
        self._names, targets = np.unique(labels, return_inverse=True)
        inputs = np.c_[features, np.ones(len(features))]
        self._weights = np.linalg.pinv(inputs) @ np.eye(len(self._names))[targets]
        return self

    def score(self, features: Any, labels: Any) -> float:
        places = (np.c_[features, np.ones(len(features))] @ self._weights).argmax(axis=1)
        return float((self._names[places] == labels).mean())


def _recipes() -> None:
    if find_spec("sklearn") is None:
        stub: Any = types.ModuleType("sklearn.linear_model")
        stub.LogisticRegression = _Probe
        sys.modules["sklearn.linear_model"] = stub


def _fork() -> dict[str, Any]:
    """LLaVA's objects, as the scripts of a fork have them."""
    tower = DiffusionVisionTower("diffenc:shapes")
    model = toy_llava.toy_model(tower)
    return {
        "model": model,
        "args": types.SimpleNamespace(),
        "MyTrainer": toy_llava.ToyTrainer,
        "data_module": {
            "train_dataset": toy_llava.ToyDataset([]),
            "eval_dataset": None,
            "data_collator": toy_llava.toy_collator,
        },
        "load_pretrained_model": lambda *_: toy_llava.load_pretrained_model(*_, model=model),
        "path": "llava-diffenc",
        "base": None,
        "name": "llava",
        "input_ids": torch.tensor([[1, -200, 5]]),
        "images": torch.zeros(1, 3, 64, 64),
    }


def _forks() -> dict[str, Any]:
    """Toy packages by the names of all forks; the desk puts the modules away."""
    names = ("eagle", "mgm", "share4v", "bunny", "cambrian", "llava_hr", "moellava")
    packages = [toy_llava.toy_package(name) for name in names]
    for package in packages:
        fork = package.__enter__()
        _give_script(fork.script)
        for other in ("build_vision_tower_aux_list", "build_image_tower"):
            exec(f"def {other}(cfg): return []", vars(fork.builder))
            setattr(fork.arch, other, getattr(fork.builder, other))
            exec(f"def make_{other}(cfg): return {other}(cfg)", vars(fork.arch))
    sys.modules["train"] = sys.modules["eagle.train.train"]
    for name in ("tinyllava.model.vision_tower", "prismatic.models.materialize"):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module: Any = types.ModuleType(".".join(parts[:end]))
            module.__path__ = []
            module.register_vision_tower = lambda _name: lambda tower: tower
            module.VISION_BACKBONES = {}
            sys.modules[module.__name__] = module
    return {**_fork(), "packages": packages}  # a package that is let go is taken away


def _chats() -> dict[str, Any]:
    """What a language model brings for chats."""
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return {"tokenizer": tiny_llava.tokenizer(), "template": template}


FOLDERS = ("models", "tokenizers", "runs", "coco", "DFN")
AROUND: dict[str, Callable[[Hub], Any]] = {
    "loading-models": _models,
    "install": _models,
    "coming-from": _models,
    "train": lambda _: _trained_models(),
    "ground-words": lambda _: _grounded_model(),
    "recipes": lambda _: _recipes(),
    "command-line": lambda _: _features(),
    "evaluate-language-models": lambda _: _answers(),
    "evaluate": lambda _: _benchmarks(),
    "replace-clip-in-llava": lambda _: _fork(),
    "host-recipes": lambda _: _forks(),
    "use-with-transformers": lambda _: _chats(),
}
"""What lies around a page beside pictures, and names that the program it is about has, by page."""


def sit_down(page: Path, hub: Hub) -> dict[str, Any]:
    """Lay out what a page needs in the working directory; the namespace its code begins in."""
    lay_out(Path())
    for folder in FOLDERS:
        Path(folder).mkdir()
    names = AROUND[page.stem](hub) if page.stem in AROUND else None
    return {"__name__": "__main__", **(names or {})}


def _is_there(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


def run(block: "re.Match[str]", page: Path, namespace: dict[str, Any]) -> None:
    """Run one block of a page in the page's namespace.

    Files that a page includes are run as a whole by `test_examples`.
    """
    code = block["code"]
    if any(
        not _is_there(name)
        for name in ENGINES
        if re.search(rf"^(import|from) {name}\b", code, re.M)
    ):
        return
    included = SNIPPET.findall(code)
    if included:
        assert all(path.startswith("examples/") for path in included), included
        code = SNIPPET.sub("", code)
    for there, here in HARDWARE + AMOUNTS:
        code = code.replace(there, here)
    line = page.read_text("utf-8").count("\n", 0, block.start("code"))
    if block["language"] == "python":
        lines = textwrap.dedent(code)
        exec(compile("\n" * line + lines, str(page), "exec"), namespace)
        return
    test = doctest.DocTestParser().get_doctest(code, namespace, page.name, str(page), line)
    test.globs = namespace
    report: list[str] = []
    doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)
