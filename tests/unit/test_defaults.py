"""Torch's default dtype and device belong to the program and change nothing that is computed."""

import ast
import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file
from tests import builders
from tests import ldm_layout as ldm
from torch import Tensor

import diffenc
from diffenc import CrossAttnScorer, DiffusionEncoder, EncoderConfig, Projector
from diffenc.clip.captioner import ImplicitCaptioner
from diffenc.clip.tokens import ClipTokens
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.inputs.noise import shared_noise
from diffenc.mllm.language import load_language_model
from diffenc.models import StableDiffusion, list_taps, load_backbone
from diffenc.models.base import Backbone
from diffenc.models.taps import count_parameters
from diffenc.projector.fused import FusedProjector
from diffenc.runtime.defaults import torch_defaults
from diffenc.scoring.denoising import denoising_scores

TAPS = ("up_blocks.0", "mid_block")
LONG = "a red circle left of a blue square " * 12


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
}


@contextmanager
def both() -> Iterator[None]:
    with default_dtype(torch.float64), default_device("meta"):
        yield


def picture(seed: int = 0, height: int = 64, width: int = 48) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def pictures() -> list[Image.Image]:
    return [picture(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def given(tiny_sd_folder, tiny_sdxl_folder, tmp_path_factory) -> SimpleNamespace:
    """Folders and a file to load from, a model that is there already, and a place to write."""
    folder = tmp_path_factory.mktemp("defaults")
    save_file(original_layout(tiny_sd_folder), folder / "tiny.safetensors")
    backbone = StableDiffusion(
        name="tiny",
        default_size=16,
        unet=builders.tiny_unet(),
        vae=builders.tiny_vae(),
        scheduler=DDPMScheduler(**builders.NOISE_SCHEDULE),
        text_encoder=builders.tiny_text_encoder(),
        tokenizer=builders.tiny_tokenizer(),
    )
    return SimpleNamespace(
        sd=tiny_sd_folder, sdxl=tiny_sdxl_folder, folder=folder, backbone=backbone
    )


def original_layout(folder: Path) -> dict[str, Tensor]:
    backbone = load_backbone(folder)
    parts = {
        "model.diffusion_model.": ldm.unet_in_original_layout(backbone.unet.state_dict()),
        "first_stage_model.": ldm.vae_in_original_layout(backbone.vae.state_dict()),
        "cond_stage_model.transformer.": ldm.clip_in_original_layout(
            backbone.text_encoder.state_dict()
        ),
    }
    state = {
        key: value
        for prefix, part in parts.items()
        for key, value in ldm.prefixed(prefix, part).items()
    }
    return {key: value.contiguous().clone() for key, value in state.items()}


def tensors_of(backbone: Backbone) -> list[Tensor]:
    return [*backbone.parameters(), *backbone.buffers(), backbone.scheduler.alphas_cumprod]


def loaded_folder(given: SimpleNamespace) -> list[Tensor]:
    encoder = DiffusionEncoder.from_pretrained(given.sd, taps="mid_block", truncate=True, size=32)
    return [encoder(picture(), "red"), *tensors_of(encoder.backbone)]


def loaded_sdxl(given: SimpleNamespace) -> list[Tensor]:
    encoder = DiffusionEncoder.from_pretrained(
        given.sdxl, taps="mid_block", size=32, original_size="image", conditioning="concat"
    )
    return [encoder(picture(), "red"), *tensors_of(encoder.backbone)]


def loaded_file(given: SimpleNamespace) -> list[Tensor]:
    return tensors_of(
        load_backbone(
            given.folder / "tiny.safetensors",
            architecture=given.sd,
            tokenizer=given.sd / "tokenizer",
        )
    )


def loaded_in_half_precision(given: SimpleNamespace) -> list[Tensor]:
    backbone = load_backbone(given.sd, dtype=torch.bfloat16)
    encoder = DiffusionEncoder(backbone, EncoderConfig(taps=("mid_block",), size=32))
    return [encoder(picture(), "red"), *tensors_of(backbone)]


def features(given: SimpleNamespace) -> list[Tensor]:
    config = EncoderConfig(taps=TAPS, timestep=(50, 261), draws=2, long_prompts="chunk")
    encoder = DiffusionEncoder(given.backbone, config, use_cache=False)
    sampled = DiffusionEncoder(given.backbone, EncoderConfig(taps=TAPS, posterior="sample", grid=3))
    found = encoder.extract(pictures(), [LONG, "red"], conditioning="cfg", guidance_scale=2.0)
    sampled.clear_cache()
    return [*found.values(), sampled(picture(), "red")]


def what_trains(given: SimpleNamespace) -> list[Tensor]:
    encoder = DiffusionEncoder(copy.deepcopy(given.backbone), EncoderConfig(taps=TAPS))
    torch.manual_seed(0)
    encoder.add_lora(rank=2)
    encoder.add_captioner("shapes-clip")
    with torch.no_grad():
        encoder.captioner.gate.fill_(0.5)
    trained = [parameter.detach().clone() for parameter in encoder.trainable_parameters()]
    return [encoder(picture(), "red").detach(), *trained]


def scores(given: SimpleNamespace) -> list[Tensor]:
    scorer = CrossAttnScorer.from_pretrained(given.backbone, timesteps=(189, 589), use_cache=False)
    found = [scorer(pictures(), ["red", "blue"])]
    for preset in ("paper", "diffusion-classifier", "discffusion"):
        other = scorer.with_options(preset=preset, timesteps=(189,), size=16)
        found.append(other(pictures(), ["red", "a blue circle"]))
    shared = scorer.with_options(mode="shared-query", token_mask="content", long_prompts="chunk")
    found += [shared(pictures(), ["red", LONG]), scorer.score_pairs(pictures(), ["red", "blue"])]
    layers = scorer.layer_scores(pictures(), ["red", "blue"])
    screened = scorer.score(pictures(), ["red", "blue", "left"], screen=1)
    plain = denoising_scores(given.backbone, shared_noise((4, 8, 8), seed=0, timestep=1)[None], "a")
    return [*found, layers, screened.trials, plain]


def banks(given: SimpleNamespace) -> list[Tensor]:
    scorer = CrossAttnScorer.from_pretrained(given.backbone, timesteps=(189,), mode="shared-query")
    scorer.clear_cache()
    folder = given.folder / os.urandom(4).hex()
    return [scorer.build_index(pictures(), folder).scores(["red", "blue"])]


def word_maps(given: SimpleNamespace) -> list[Tensor]:
    scorer = CrossAttnScorer.from_pretrained(given.backbone, timesteps=(189,), use_cache=False)
    maps = [scorer.word_maps(picture(), "a red circle", preset=p) for p in (None, "daam")]
    return [torch.from_numpy(each.array) for found in maps for each in found.values()]


def what_is_made_anew(given: SimpleNamespace) -> list[Tensor]:
    torch.manual_seed(0)
    modules = [
        Projector(12, 8, norm_channels=(5, 7)),
        Projector(6, 8, "linear"),
        FusedProjector((6, 5), 8, how="interleave", norm_channels=((6,), (2, 3))),
        ImplicitCaptioner(6, 8, length=5, pooled_width=7),
    ]
    noise = shared_noise((4, 3, 5), seed=1, timestep=2)
    return [noise, *(p.detach() for module in modules for p in module.parameters())]


def saved_projectors(given: SimpleNamespace) -> list[Tensor]:
    torch.manual_seed(0)
    folder = given.folder / os.urandom(4).hex()
    Projector(12, 8, norm_channels=(5, 7)).save_pretrained(folder)
    tokens = torch.linspace(-1, 1, 36, dtype=torch.float32, device="cpu").reshape(1, 3, 12)
    return [Projector.from_pretrained(folder)(tokens).detach()]


def other_models(given: SimpleNamespace) -> list[Tensor]:
    clip = ClipTokens.from_pretrained("shapes-clip", use_cache=False)
    model, tokenizer = load_language_model("shapes-lm")
    ids = torch.tensor(
        [tokenizer("what color is the circle?").input_ids], dtype=torch.long, device="cpu"
    )
    with torch.no_grad():
        return [clip(picture()), *model.parameters(), model(input_ids=ids).logits]


def towers(given: SimpleNamespace) -> list[Tensor]:
    tower = DiffusionVisionTower("diffenc:shapes?t=50&rank=2")
    values = torch.linspace(-1, 1, 3 * 64 * 64, dtype=torch.float32, device="cpu")
    found = tower(values.reshape(1, 3, 64, 64), ["a red circle"])
    return [found.detach(), *(parameter.detach() for parameter in tower.adapter.parameters())]


CASES: list[Callable[[SimpleNamespace], list[Tensor]]] = [
    loaded_folder,
    loaded_sdxl,
    loaded_file,
    loaded_in_half_precision,
    features,
    what_trains,
    scores,
    banks,
    word_maps,
    what_is_made_anew,
    saved_projectors,
    other_models,
    towers,
]


def check(case, given, changed) -> None:
    with torch.random.fork_rng():
        wanted = case(given)
        with changed():
            found = case(given)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert one.equal(other)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_results_do_not_depend_on_the_defaults(case, given):
    # Hosts build a tower on the meta device and load afterwards: it waits for that.
    check(case, given, DEFAULTS["float64"] if case is towers else both)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case.__name__)
def test_results_do_not_depend_on_either_default(case, given, name):
    check(case, given, DEFAULTS[name])


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_known_of_a_model_before_it_is_loaded_does_not_depend_on_them(name, given):
    config = given.backbone.unet.config
    options = {**config, "layers_per_block": 2}  # of no other test, as results are remembered
    whole = count_parameters(dict(options))
    with DEFAULTS[name]():
        assert count_parameters(dict(options)) == whole
        assert list_taps(given.sd)


@pytest.mark.parametrize("name", DEFAULTS)
def test_pinned_defaults_are_put_back(name):
    with DEFAULTS[name]():
        before = torch.empty(0)
        with torch_defaults(), torch_defaults():
            inside = torch.empty(0)
            assert (inside.dtype, inside.device.type) == (torch.float32, "cpu")
        after = torch.empty(0)
    assert (after.dtype, after.device) == (before.dtype, before.device)
    with pytest.raises(ValueError, match="inside"), DEFAULTS[name](), torch_defaults():
        raise ValueError("inside")
    assert torch.empty(0).dtype == torch.float32


# What makes a tensor of its own, in torch and in torch.nn.
TENSORS = (  # noqa: SIM905
    "arange as_tensor asarray empty eye full hann_window linspace logspace ones rand randint randn "
    "randperm range scalar_tensor tensor tril_indices triu_indices zeros"
).split()
MODULES = (  # noqa: SIM905
    "BatchNorm1d BatchNorm2d Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d "
    "Embedding EmbeddingBag GRU GroupNorm LSTM LayerNorm Linear MultiheadAttention RMSNorm RNN "
    "Transformer TransformerDecoderLayer TransformerEncoderLayer"
).split()
# Where the defaults themselves are what counts: file, function.
READ_ON_PURPOSE = {
    ("runtime/defaults.py", "torch_defaults"),  # asks what they are
    ("hosts/loading.py", "builds_on_meta"),  # asks where a host builds
    ("hosts/transformers/modeling.py", "__init__"),  # a buffer that follows the host
    ("hosts/transformers/modeling.py", "_register"),  # another, of whole numbers
}


def constructors(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """Function, name and call of each tensor or module with weights that is made."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.Module):
            continue
        inside = [node for child in ast.iter_child_nodes(function) for node in _own(child)]
        for node in inside:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            where, name = ast.unparse(node.func.value), node.func.attr
            known = {"torch": [*TENSORS, "Generator"], "nn": MODULES, "torch.nn": MODULES}
            if name in known.get(where, ()):
                yield getattr(function, "name", ""), name, node


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """A node and what lies in it, without functions inside."""
    if isinstance(node, ast.FunctionDef):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _own(child)


def names_its_place(name: str, call: ast.Call) -> bool:
    """Whether dtype and device are there; `**place` is a dict of both by its name."""
    if name == "Generator":  # of the CPU or of a device, and of no dtype
        return bool(call.args or call.keywords)
    keywords = {keyword.arg for keyword in call.keywords}
    whole = any(k.arg is None and ast.unparse(k.value) == "place" for k in call.keywords)
    return whole or {"dtype", "device"} <= keywords


@cache
def sources() -> dict[str, ast.Module]:
    root = Path(diffenc.__file__).parent
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    }


@pytest.mark.long
def test_whatever_makes_a_tensor_names_its_dtype_and_its_device():
    lacking, on_purpose = [], set()
    for source, tree in sources().items():
        for function, name, call in constructors(tree):
            if names_its_place(name, call):
                continue
            if (source, function) in READ_ON_PURPOSE:
                on_purpose.add((source, function))
                continue
            lacking.append(f"{source}:{call.lineno}: {ast.unparse(call)}")
    assert not lacking, "\n".join(lacking)
    assert on_purpose == READ_ON_PURPOSE


@pytest.mark.long
def test_a_dict_called_place_has_both():
    for source, tree in sources().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Dict):
                continue
            if ast.unparse(node.target) == "place":
                keys = [key and ast.literal_eval(key) for key in node.value.keys]
                assert keys == ["dtype", "device"], source


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("torch.zeros(3)", False),
        ("torch.zeros(3, dtype=torch.long)", False),
        ("torch.zeros(3, device=x.device)", False),
        ("torch.zeros(3, dtype=torch.long, device=x.device)", True),
        ("torch.arange(3, **place)", True),
        ("torch.arange(3, **options)", False),
        ("torch.Generator().manual_seed(0)", False),
        ("torch.Generator('cpu').manual_seed(0)", True),
        ("nn.Linear(2, 3)", False),
        ("nn.Parameter(torch.empty(3))", False),
        ("nn.Parameter(torch.empty(3, dtype=d, device=e))", True),
        ("[torch.eye(n) for n in range(3)]", False),
    ],
)
def test_the_check_sees_what_it_looks_for(code, right):
    found = [
        names_its_place(name, call)
        for text in (code, f"def f(self):\n    def g():\n        return {code}\n    return g")
        for _, name, call in constructors(ast.parse(text))
    ]
    assert found == [right, right]


def test_weights_may_be_swapped_where_a_program_asks_torch_for_it(tiny_sd_folder):
    encoder = DiffusionEncoder.from_pretrained(tiny_sd_folder)
    shown = torch.zeros(1, 3, 64, 64, device="cpu")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        encoder.extract(shown, "red", conditioning="cfg")
        encoder.to(torch.bfloat16)
        assert encoder.extract(shown, "red", conditioning="cfg").tokens().dtype == torch.bfloat16
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
