"""Models that bring code of their own: refused in a sentence, and nothing of it is imported."""

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from diffenc import DiffusionEncoder, load_backbone
from diffenc.clip.captioner import ClipEmbedder
from diffenc.clip.tokens import ClipTokens
from diffenc.errors import BackboneError, DiffencError
from diffenc.evals.llava_bench.local_judge import LocalJudge
from diffenc.evals.matching.clip import ClipMatcher
from diffenc.mllm.language import load_language_model
from diffenc.mllm.training.meta import meta_language_model
from diffenc.mllm.vision import VisionTokens
from diffenc.models import list_taps
from diffenc.models.parts import load_tokenizer
from diffenc.storage.pretrained import load_image_processor, model_config, pretrained_source

CODE = "open({mark!r}, 'w').write('ran')\nclass Own:\n    pass\nConfig = Model = Tokenizer = Own\n"
REFUSED = "asks for Python code of its own to be run.*which diffenc never does"


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that the code of the models below writes; whoever asks on the terminal gets a yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def with_code(source, folder, mark, file, **entries):
    """A copy of a model's folder with code in it, and a config that names the code."""
    shutil.copytree(source, folder)
    for target in (folder, (folder / file).parent):
        (target / "own.py").write_text(CODE.format(mark=str(mark)))
    path = folder / file
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**config, **entries}))
    return folder


def everywhere(name: str) -> dict[str, object]:
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor")
    return {"auto_map": dict.fromkeys(kinds, f"{name}.Own") | {"AutoTokenizer": [name, name]}}


LANGUAGE = [load_language_model, model_config, meta_language_model, lambda f: LocalJudge(f).check()]
VISION = [
    ClipMatcher.from_pretrained,
    ClipEmbedder.from_name,
    ClipTokens.from_pretrained,
    VisionTokens.from_pretrained,
    load_image_processor,
]


@pytest.mark.parametrize("load", LANGUAGE, ids=range(len(LANGUAGE)))
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_language_models_with_code_are_refused(tmp_path, mark, load, file, kind):
    source = pretrained_source("shapes-lm")
    folder = with_code(source, tmp_path / "lm", mark, file, model_type=kind, **everywhere("own"))
    with pytest.raises(DiffencError, match=REFUSED):
        load(str(folder))


@pytest.mark.parametrize("load", VISION, ids=range(len(VISION)))
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_vision_models_with_code_are_refused(tmp_path, mark, load, file):
    source = pretrained_source("shapes-clip")
    entries = everywhere("somebody/else--own")
    folder = with_code(source, tmp_path / "clip", mark, file, **entries)
    with pytest.raises(BackboneError, match=REFUSED):
        load(str(folder))


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("model_index.json", {"_class_name": ["own", "Own"]}),
        ("model_index.json", {"custom_pipelines": {"own": {}}}),
        ("unet/config.json", {"_class_name": ["own", "Own"]}),
        ("unet/config.json", everywhere("own")),
        ("vae/config.json", {"trust_remote_code": True}),
        ("text_encoder/config.json", everywhere("own")),
        ("tokenizer/tokenizer_config.json", everywhere("own")),
        ("scheduler/scheduler_config.json", {"_class_name": ["own", "Own"]}),
    ],
)
def test_diffusion_models_with_code_are_refused(tiny_sd_folder, tmp_path, mark, file, entries):
    folder = with_code(tiny_sd_folder, tmp_path / "sd", mark, file, **entries)
    with pytest.raises(BackboneError, match=REFUSED):
        load_backbone(folder)
    with pytest.raises(BackboneError, match=REFUSED):
        DiffusionEncoder.from_pretrained(folder, truncate=True, taps="mid_block")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_pipeline_with_a_part_from_elsewhere_is_refused(tiny_sd_folder, tmp_path, mark, part):
    entries = {part: ["own", "Own"]}
    folder = with_code(tiny_sd_folder, tmp_path / "sd", mark, "model_index.json", **entries)
    for read in (load_backbone, list_taps):
        with pytest.raises(BackboneError, match=f"takes its {part} from own, code"):
            read(folder)


def test_given_parts_with_code_are_refused(tiny_sd_folder, tmp_path, mark):
    for part in ("vae", "text_encoder"):
        file = f"{part}/config.json"
        folder = with_code(tiny_sd_folder, tmp_path / part, mark, file, **everywhere("own"))
        with pytest.raises(BackboneError, match=REFUSED):
            load_backbone(tiny_sd_folder, **{part: folder / part})
    file = "tokenizer/tokenizer_config.json"
    folder = with_code(tiny_sd_folder, tmp_path / "t", mark, file, **everywhere("own"))
    with pytest.raises(BackboneError, match=REFUSED):
        load_tokenizer(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_somebody_s_repository_is_refused(tmp_path, mark, key):
    entries = {key: "somebody/kernels"}
    source = pretrained_source("shapes-lm")
    folder = with_code(source, tmp_path / "lm", mark, "config.json", **entries)
    with pytest.raises(BackboneError, match=REFUSED):
        load_language_model(folder)


def test_code_that_takes_part_in_generation_is_refused(tmp_path, mark):
    folder = with_code(pretrained_source("shapes-lm"), tmp_path / "lm", mark, "config.json")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises(BackboneError, match=REFUSED):
        load_language_model(folder)


def test_code_that_no_config_names_is_left_where_it_is(tmp_path, mark):
    folder = with_code(pretrained_source("shapes-lm"), tmp_path / "lm", mark, "config.json")
    load_language_model(folder)


def test_pickled_weights_are_not_opened(tmp_path, mark):
    class Harm:
        def __reduce__(self):
            return open, (str(mark), "w")

    folder = shutil.copytree(pretrained_source("shapes-lm"), tmp_path / "lm")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"pytorch_model\.bin, a format that can run code"):
        load_language_model(folder)
    save_file({"x": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="holds no whole LlamaForCausalLM"):
        load_language_model(folder)
