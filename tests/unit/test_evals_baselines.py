"""SigLIP of transformers and models of open_clip as baselines."""

import json
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from builders import seeded, tiny_tokenizer
from diffenc.errors import BackboneError, MissingExtraError
from diffenc.evals import ScorerMatcher, evaluate, shapes_benchmark
from diffenc.evals.matching.baselines import load_baseline
from diffenc.evals.matching.clip import ClipMatcher
from diffenc.evals.matching.open_clip_models import OpenClipMatcher
from diffenc.evals.matching.report import tables, to_dict
from diffenc.evals.matching.siglip import SiglipMatcher
from diffenc.scorer import CrossAttnScorer
from evals_data import picture
from vlm_builders import save_tiny_clip

LENGTH = 6
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "its", "."]
TEXTS = ["a red circle", "A blue,  square.", "photo"]


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """A random SigLIP for texts of 6 words and images of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("siglip") / "tiny-siglip"
    width = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    text = {**width, "num_hidden_layers": 2, "vocab_size": len(WORDS), "pad_token_id": 0}
    text |= {"max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**width, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = SiglipConfig(text_config=text, vision_config=vision)
    seeded(lambda: SiglipModel(config)).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    _set_tokenizer(folder, "SiglipTokenizer")
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def _set_tokenizer(folder, name):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": name}))


def test_siglip_scores_by_its_logits_of_padded_bare_words(siglip_folder):
    matcher = load_baseline(siglip_folder)
    assert isinstance(matcher, SiglipMatcher)
    images = [picture(0, 0, size=(16, 16)), picture(1, 1, size=(16, 16))]
    scores = matcher(images, TEXTS)
    model = SiglipModel.from_pretrained(siglip_folder)
    ids = [[3, 4, 6, 1, 0, 0], [3, 5, 7, 1, 0, 0], [2, 1, 0, 0, 0, 0]]
    for row, image in enumerate(images):
        rgb = torch.tensor(image.getpixel((0, 0))) / 127.5 - 1
        for column, text in enumerate(ids):
            with torch.no_grad():
                out = model(
                    input_ids=torch.tensor([text]),
                    pixel_values=rgb[None, :, None, None].expand(1, 3, 16, 16),
                )
                cosine = torch.cosine_similarity(out.image_embeds[0], out.text_embeds[0], dim=0)
                expected = model.logit_scale.exp() * cosine + model.logit_bias
            torch.testing.assert_close(scores[row, column], expected[0], rtol=1e-4, atol=1e-4)


def test_siglip_counts_what_it_does_not_read_and_keeps_the_end(siglip_folder):
    matcher = load_baseline(siglip_folder)
    assert list(matcher.truncated(["a red circle", "a red circle " * 3])) == [0, 9 + 1 - LENGTH]
    image = [picture(0, 0, size=(16, 16))]
    long, short = "a red circle a red blue blue", "a red circle a red"
    assert torch.equal(matcher(image, [long]), matcher(image, [short]))
    evaluation = evaluate(shapes_benchmark("winoground", per_label=1), [matcher], trials=3)
    assert evaluation.scores["tiny-siglip"].shape == (1, 5, 2, 2)


def test_siglip_2_reads_punctuation(siglip_folder, tmp_path):
    matcher = load_baseline(siglip_folder)
    image = [picture(0, 0, size=(16, 16))]
    assert torch.equal(matcher(image, ["A red circle."]), matcher(image, ["a red circle"]))
    later = SiglipMatcher(matcher.model, matcher.tokenizer, matcher.processor, name="2")
    assert not torch.equal(later(image, ["A red circle."]), later(image, ["a red circle"]))
    assert torch.equal(later(image, ["A red circle"]), later(image, ["a red circle"]))


def test_a_siglip_without_its_tokenizers_library_says_what_to_install(
    siglip_folder, tmp_path, monkeypatch
):
    folder = tmp_path / "siglip"
    folder.mkdir()
    for path in siglip_folder.iterdir():
        if path.name != "tokenizer.json":
            (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffenc\[siglip\]'"):
        load_baseline(folder)
    with pytest.raises(BackboneError, match="cannot load a SigLIP"):
        SiglipMatcher.from_pretrained(tmp_path / "nowhere")


class Stub(torch.nn.Module):
    """As much of a model of open_clip as is called: colours and letters are the embeddings."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Linear(3, 3, bias=False)
        self.text = torch.nn.Linear(3, 3)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-1.0))
        self.context_length = 4

    def encode_image(self, pixel_values, normalize):
        assert normalize
        return torch.nn.functional.normalize(pixel_values, dim=-1)

    encode_text = encode_image


class StubTokenizer:
    context_length = 4

    def encode(self, text):
        return list(text)

    def __call__(self, texts):
        return torch.tensor([[1.0, float(len(text)), 0.0] for text in texts])


@pytest.fixture
def open_clip_folder(tmp_path, monkeypatch):
    """A folder of a model of open_clip, and in the library's place what remembers its calls."""
    folder = tmp_path / "tiny-open-clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "config.json").write_text('{"architecture": "vit_of_timm"}')
    save_file({"a": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    library = ModuleType("open_clip")
    library.calls = []

    def create_model_from_pretrained(name, device, precision):
        library.calls.append((name, str(device), precision))
        return Stub(), lambda image: torch.tensor(image.getpixel((0, 0))) / 255

    library.create_model_from_pretrained = create_model_from_pretrained
    library.get_tokenizer = lambda name: library.calls.append(name) or StubTokenizer()
    monkeypatch.setitem(sys.modules, "open_clip", library)
    return folder, library


def test_open_clip_scores_by_its_logits(open_clip_folder):
    folder, library = open_clip_folder
    matcher = load_baseline(folder, dtype=torch.bfloat16)
    assert isinstance(matcher, OpenClipMatcher)
    source = f"local-dir:{folder}"
    assert library.calls == [(source, "cpu", "pure_bf16"), source]
    red, white = (Image.new("RGB", (4, 4), color) for color in ("red", "white"))
    scores = matcher([red, white], ["", "aa"])
    scale = torch.tensor(2.0).exp()
    cosines = torch.tensor([[1.0, 5**-0.5], [3**-0.5, 3 / 15**0.5]])
    torch.testing.assert_close(scores, scale * cosines - 1, rtol=1e-4, atol=1e-4)
    assert matcher.truncated(["a", "abcd"]) == [0, 2]
    assert matcher.name == "tiny-open-clip"
    assert matcher.parameters == {"image tower": 9, "text tower": 12, "whole": 23}


def test_open_clip_that_cannot_be_used_is_told(open_clip_folder, tmp_path, monkeypatch):
    folder, _ = open_clip_folder
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffenc\[open-clip\]'"):
        load_baseline(folder)
    broken = tmp_path / "library"
    broken.mkdir()
    (broken / "open_clip.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.syspath_prepend(broken)
    with pytest.raises(BackboneError, match="nms does not exist; it needs a torchvision that"):
        load_baseline(folder)


def test_pickled_weights_of_open_clip_are_refused(open_clip_folder):
    folder, library = open_clip_folder
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(BackboneError, match="can run code when they are opened"):
        load_baseline(folder)
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(BackboneError, match=r"open_clip_config\.json is missing"):
        OpenClipMatcher.from_pretrained(folder)
    assert library.calls == []


def test_transformers_reads_what_both_could(tmp_path):
    save_tiny_clip(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert isinstance(load_baseline(tmp_path), ClipMatcher)
    with pytest.raises(BackboneError, match="cannot load a CLIP from"):
        load_baseline(tmp_path / "nowhere")


@pytest.mark.long
def test_parameters_of_all_contenders_are_told(siglip_folder):
    clip = ClipMatcher.from_pretrained("shapes-clip")
    scorer = CrossAttnScorer.from_pretrained("shapes", preset="paper", timesteps=(489,))
    matchers = [ScorerMatcher(scorer, name="sd"), clip, load_baseline(siglip_folder)]
    evaluation = evaluate(shapes_benchmark("winoground", per_label=1), matchers, trials=1)
    table = tables(evaluation)[-1]
    assert table.columns == ("model", "image tower", "text tower", "whole")
    assert [row[0] for row in table.rows] == ["sd", "shapes-clip", "tiny-siglip"]
    whole = sum(p.numel() for p in CLIPModel.parameters(clip.model))
    assert evaluation.parameters["shapes-clip"]["whole"] == whole
    assert table.rows[1][-1] == f"{whole / 1e6:.1f}"
    parts = scorer.backbone.parts()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert evaluation.parameters["sd"] == {
        "image tower": counts["unet"] + counts["vae"],
        "text tower": counts["text_encoder"],
        "whole": sum(counts.values()),
    }
    for name, sizes in evaluation.parameters.items():
        rest = sizes["whole"] - sizes["image tower"] - sizes["text tower"]
        assert rest == {"sd": 0, "shapes-clip": 1, "tiny-siglip": 2}[name]  # scale, bias
    assert to_dict(evaluation)["models"]["sd"]["parameters"] == evaluation.parameters["sd"]
    beside = tables(evaluation, paper=True)[-1]
    assert ("paper: EVA02 ViT-bigE-14+ 224", "–", "–", "5044.9") in beside.rows


CONFIG = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16,
            "layers": 2,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 8,
            "heads": 2,
            "layers": 2,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
}


def test_a_real_model_of_open_clip_scores_as_by_itself(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    model = seeded(lambda: open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    matcher = load_baseline(tmp_path)
    images = [picture(0, 0, size=(16, 16)), picture(1, 1, size=(16, 16))]
    scores = matcher(images, TEXTS)
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][name]) for name in ("mean", "std"))
    for row, image in enumerate(images):
        rgb = (torch.tensor(image.getpixel((0, 0))) / 255 - mean) / std
        for column, text in enumerate(TEXTS):
            ids = open_clip.tokenize([text], context_length=12)
            with torch.no_grad():
                one, other, scale = model.eval()(rgb[None, :, None, None].expand(1, 3, 16, 16), ids)
                expected = scale * (one * other).sum()
            torch.testing.assert_close(scores[row, column], expected, rtol=1e-4, atol=1e-4)
    assert matcher.truncated(["a red circle", "red " * 15]) == [0, 15 + 2 - 12]
    evaluation = evaluate(shapes_benchmark("winoground", per_label=1), [matcher])
    sizes = evaluation.parameters[matcher.name]
    assert sizes["whole"] == sum(p.numel() for p in model.parameters())
    assert sizes["image tower"] == sum(p.numel() for p in model.visual.parameters())
