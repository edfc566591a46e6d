"""Which files of a folder are read, by everybody, and what is refused in them."""

import copy
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffenc import CrossAttnScorer, DiffusionEncoder, load_backbone
from diffenc.errors import BackboneError, ConfigError, DiffencError
from diffenc.storage.weights import choose_weights, variants

STEM = "diffusion_pytorch_model"
PARTS = {
    "unet": f"{STEM}.safetensors",
    "vae": f"{STEM}.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture(scope="module")
def expected(tiny_sd_folder):
    """Weights of the good folder."""
    return states(load_backbone(tiny_sd_folder))


@pytest.fixture(scope="module")
def sd_parts(tiny_sd_folder):
    return load_backbone(tiny_sd_folder).parts()


@pytest.fixture(scope="module")
def sdxl_parts(tiny_sdxl_folder):
    return load_backbone(tiny_sdxl_folder).parts()


def others(parts, part: str):
    """Parts to pass in place of a folder's, all but one: that one alone is read."""
    return {name: module for name, module in parts.items() if name != part}


@pytest.fixture
def folder(tiny_sd_folder, tmp_path):
    """A copy of a good folder, to be changed."""
    return shutil.copytree(tiny_sd_folder, tmp_path / "model")


def states(backbone) -> dict[str, dict[str, torch.Tensor]]:
    return {name: part.state_dict() for name, part in backbone.parts().items()}


def same(one, other) -> bool:
    return all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(one[part][name], other[part][name]) for name in one[part])
        for part in one
    )


def weights_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    # Copies: older safetensors maps the file itself, which tests overwrite.
    return {name: value.clone() for name, value in load_file(folder / part / PARTS[part]).items()}


def write_weights(folder: Path, part: str, state, name: str | None = None) -> None:
    path = folder / part / (name or PARTS[part])
    save_file({key: value.contiguous() for key, value in state.items()}, path, {"format": "pt"})


def other(state):
    return {name: value + 1 for name, value in state.items()}


def into_shards(folder: Path, part: str, index: str, shard: str, dtype=torch.float32) -> None:
    """Replace a part's one file by two, named by a pattern with a {number}."""
    state = {name: value.to(dtype) for name, value in weights_of(folder, part).items()}
    (folder / part / PARTS[part]).unlink()
    places, names = {}, sorted(state)
    for number in (1, 2):
        own = {name: state[name] for name in names[number - 1 :: 2]}
        file = shard.format(number=number)
        write_weights(folder, part, own, file)
        places |= dict.fromkeys(own, file)
    (folder / part / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("kind", ["tiny_sd_folder", "tiny_sd21_folder", "tiny_sdxl_folder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_part_has_the_values_that_its_own_library_reads(request, kind, dtype):
    folder = request.getfixturevalue(kind)
    backbone = load_backbone(folder, dtype=dtype, channels_last=False)
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    for name, part in backbone.parts().items():
        upcast = name == "vae" and part.config.force_upcast and dtype == torch.float16
        kept = torch.float32 if upcast else dtype
        theirs = kinds[name].from_pretrained(folder / name).to(kept)
        own, expected = part.state_dict(), theirs.state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[key], expected[key]) for key in expected), name
        assert {value.dtype for value in own.values()} == {kept}
        assert type(part) is type(theirs)
        assert not part.training


@pytest.mark.parametrize("name", [f"{STEM}_ema", f"{STEM}.v2", f"{STEM}_old", f"{STEM}.non_ema"])
def test_files_beside_the_weights_are_left_alone_whole_or_truncated(folder, expected, name):
    write_weights(folder, "unet", other(weights_of(folder, "unet")), f"{name}.safetensors")
    assert same(states(load_backbone(folder)), expected)
    short = load_backbone(folder, keep_taps=["mid_block"]).unet.state_dict()
    assert all(torch.equal(value, expected["unet"][key]) for key, value in short.items())


@pytest.mark.parametrize(
    ("part", "index", "shard"),
    [
        ("unet", f"{STEM}.safetensors.index.json", STEM + "-{number:05d}-of-00002.safetensors"),
        ("vae", f"{STEM}.safetensors.index.json", STEM + "-{number:05d}-of-00002.safetensors"),
        ("text_encoder", "model.safetensors.index.json", "model-{number:05d}-of-00002.safetensors"),
    ],
)
def test_shards_are_read_by_their_index_whole_or_truncated(folder, expected, part, index, shard):
    into_shards(folder, part, index, shard)
    assert same(states(load_backbone(folder)), expected)
    short = load_backbone(folder, keep_taps=["mid_block"]).unet.state_dict()
    assert all(torch.equal(value, expected["unet"][key]) for key, value in short.items())


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (f"{STEM}.safetensors.index.fp16.json", STEM + ".fp16-{number:05d}-of-00002.safetensors"),
        (f"{STEM}.fp16.safetensors.index.json", STEM + "-{number:05d}-of-00002.fp16.safetensors"),
        (f"{STEM}.safetensors.fp16.index.json", STEM + "-{number:05d}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_in_half_precision_are_found_under_all_their_names(
    folder, expected, sd_parts, index, shard
):
    into_shards(folder, "unet", index, shard, torch.float16)
    parts = {name: copy.deepcopy(part) for name, part in others(sd_parts, "unet").items()}
    for options in ({}, {"variant": "fp16"}, {"keep_taps": ["mid_block"]}):
        unet = load_backbone(folder, dtype=torch.float16, **parts, **options).unet.state_dict()
        assert all(torch.equal(value, expected["unet"][key].half()) for key, value in unet.items())


def halved(folder: Path, part: str, *, full: bool) -> None:
    """Write a part's weights in half precision beside the full ones, or in their place."""
    state = weights_of(folder, part)
    name = PARTS[part].replace(".safetensors", ".fp16.safetensors")
    write_weights(folder, part, {key: value.half() for key, value in state.items()}, name)
    if not full:
        (folder / part / PARTS[part]).unlink()


def read_files(monkeypatch) -> list[str]:
    """Names of the weight files that are opened from now on."""
    import diffenc.storage.weights as module

    names: list[str] = []
    opened = module.safe_open

    def spy(path, **options):
        names.append(Path(path).name)
        return opened(path, **options)

    monkeypatch.setattr(module, "safe_open", spy)
    return names


@pytest.mark.long
def test_half_precision_is_read_where_no_more_is_asked_for(folder, monkeypatch):
    for part in ("unet", "vae", "text_encoder"):
        halved(folder, part, full=True)
    expected = {
        dtype: states(load_backbone(folder, dtype=dtype, variant=""))
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    for dtype, is_half in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        names = read_files(monkeypatch)
        backbone = load_backbone(folder, dtype=dtype)
        assert any(".fp16." in name for name in names) == is_half
        assert same(states(backbone), expected[dtype])
        monkeypatch.undo()


def test_a_vae_that_overflows_is_read_in_full_beside_a_half_unet(tiny_sdxl_folder, tmp_path):
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    for part in PARTS:
        halved(folder, part, full=True)
    write_weights(folder, "vae", weights_of(folder, "vae"))
    vae = load_backbone(folder, dtype=torch.float16).vae
    assert vae.dtype == torch.float32
    assert torch.equal(
        vae.state_dict()["encoder.conv_in.weight"],
        weights_of(folder, "vae")["encoder.conv_in.weight"],
    )


@pytest.mark.long
def test_half_precision_alone_is_read_and_said_once(folder):
    for part in ("unet", "text_encoder"):
        halved(folder, part, full=False)
    with pytest.warns(UserWarning, match="has its unet, text_encoder in half precision") as said:
        backbone = load_backbone(folder)
    assert len(said) == 1
    assert backbone.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_backbone(folder, dtype=torch.float16)
        load_backbone(folder, dtype=torch.bfloat16)
        load_backbone(folder, variant="fp16")


@pytest.mark.long
def test_half_precision_of_other_weights_is_not_taken_in_silence(folder):
    halved(folder, "unet", full=True)
    tuned = other(weights_of(folder, "unet"))
    write_weights(folder, "unet", tuned)
    with pytest.raises(BackboneError, match=r"other weights in half.*variant='fp16' or variant=''"):
        load_backbone(folder, dtype=torch.float16)
    full = load_backbone(folder, dtype=torch.float16, variant="").unet.state_dict()
    assert torch.equal(full["conv_in.weight"], tuned["conv_in.weight"].half())
    half = load_backbone(folder, dtype=torch.float16, variant="fp16").unet.state_dict()
    assert not torch.equal(half["conv_in.weight"], full["conv_in.weight"])


def test_one_other_weight_among_all_is_enough_to_ask(folder):
    halved(folder, "unet", full=True)
    state = weights_of(folder, "unet")
    names = sorted(state)
    for name in (names[1], names[-2]):
        write_weights(folder, "unet", {**state, name: state[name] * 3 + 1})
        with pytest.raises(BackboneError, match="other weights in half"):
            load_backbone(folder, dtype=torch.float16)


@pytest.mark.long
def test_a_variant_is_read_where_a_part_has_it_and_found_again(folder, expected, tmp_path):
    ema = other(weights_of(folder, "unet"))
    write_weights(folder, "unet", ema, f"{STEM}.non_ema.safetensors")
    options = {"taps": ("mid_block",), "size": 64, "variant": "non_ema"}
    encoder = DiffusionEncoder.from_pretrained(folder, **options)
    assert torch.equal(encoder.backbone.unet.state_dict()["conv_in.weight"], ema["conv_in.weight"])
    encoder.save_pretrained(tmp_path / "encoder")
    again = DiffusionEncoder.from_pretrained(tmp_path / "encoder")
    assert same(states(again.backbone), states(encoder.backbone))
    scorer = CrossAttnScorer.from_pretrained(folder, variant="non_ema")
    scorer.save_pretrained(tmp_path / "scorer")
    again = CrossAttnScorer.from_pretrained(tmp_path / "scorer")
    assert same(states(again.backbone), states(encoder.backbone))
    plain = CrossAttnScorer.from_pretrained(tmp_path / "scorer", variant="")
    assert same(states(plain.backbone), expected)


def test_variants_that_are_not_there_are_refused_with_those_that_are(folder):
    halved(folder, "unet", full=True)
    with pytest.raises(BackboneError, match=r"no weights of the variant 'bf16'.*'' or 'fp16'"):
        load_backbone(folder, variant="bf16")
    for wrong in ("../x", "a/b", 16, "fp16.safetensors", "a b"):
        with pytest.raises(BackboneError, match="variant must be a word"):
            load_backbone(folder, variant=wrong)
    with pytest.raises(ConfigError, match="a Backbone has its parts"):
        load_backbone(load_backbone(folder), variant="fp16")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused_with_how_to_convert_them(folder, sd_parts, part):
    state = weights_of(folder, part)
    name = PARTS[part].replace(".safetensors", ".bin").replace("model.bin", "pytorch_model.bin")
    torch.save(state, folder / part / name)
    (folder / part / PARTS[part]).unlink()
    with pytest.raises(BackboneError, match=r"can run code.*Convert it: .*save_pretrained"):
        load_backbone(folder, **others(sd_parts, part))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("kind", ["parent", "absolute", "number", "bin", "gone", "empty", "list"])
def test_an_index_that_leads_astray_is_refused(folder, sd_parts, part, kind):
    stem = PARTS[part].removesuffix(".safetensors")
    index = folder / part / f"{stem}.safetensors.index.json"
    into_shards(folder, part, index.name, stem + "-{number:05d}-of-00002.safetensors")
    content = json.loads(index.read_text())
    outside = shutil.copy(
        folder / part / f"{stem}-00001-of-00002.safetensors", folder.parent / "x.safetensors"
    )
    first = f"{stem}-00001-of-00002.safetensors"
    other_name = {
        "parent": "../../x.safetensors",
        "absolute": str(outside),
        "number": 5,
        "bin": "x.bin",
        "gone": "not-there.safetensors",
    }
    if kind == "empty":
        content["weight_map"] = {}
    elif kind == "list":
        content = [content]
    else:
        places = content["weight_map"].items()
        content["weight_map"] = {k: other_name[kind] if v == first else v for k, v in places}
    index.write_text(json.dumps(content))
    with pytest.raises(BackboneError):
        load_backbone(folder, **others(sd_parts, part))
    if part == "unet":
        with pytest.raises(BackboneError):
            load_backbone(folder, keep_taps=["mid_block"])


def test_an_index_and_its_shards_must_agree(folder):
    index = folder / "unet" / f"{STEM}.safetensors.index.json"
    into_shards(folder, "unet", index.name, STEM + "-{number:05d}-of-00002.safetensors")
    content = json.loads(index.read_text())
    del content["weight_map"]["conv_in.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(BackboneError, match=r"disagree on 1 weights, such as 'conv_in\.weight'"):
        load_backbone(folder)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_links_within_a_folder_are_followed_as_in_the_hub_s_cache(folder, expected, tmp_path):
    into_shards(
        folder,
        "unet",
        f"{STEM}.safetensors.index.json",
        STEM + "-{number:05d}-of-00002.safetensors",
    )
    for number, path in enumerate(sorted((folder / "unet").glob("*.safetensors"))):
        blob = tmp_path / f"blob{number}"
        path.rename(blob)
        path.symlink_to(blob)
    assert same(states(load_backbone(folder)), expected)


PATTERNS = [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.safetensors.index.json"]


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        (PATTERNS, {}, (f"{STEM}.safetensors.index.json", "")),
        (PATTERNS[:2], {}, (f"{STEM}.safetensors", "")),
        (PATTERNS[:2], {"half": True}, (f"{STEM}.fp16.safetensors", "fp16")),
        (PATTERNS[1:2], {}, (f"{STEM}.fp16.safetensors", "fp16")),
        (PATTERNS[:2], {"variant": "", "half": True}, (f"{STEM}.safetensors", "")),
    ],
)
def test_the_rule_of_which_file_is_read(names, options, chosen):
    assert choose_weights([*names, "config.json", "x.bin"], STEM, where="it", **options) == chosen


def test_transformers_takes_one_file_before_an_index():
    names = ["model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors"]
    assert choose_weights(names, "model", where="it")[0] == "model.safetensors"
    assert variants([*names, "model_ema.safetensors", "model.safetensors.md"], "model") == [
        "",
        "fp16",
    ]


CHANGES = {
    "missing": (lambda w, key: {k: v for k, v in w.items() if k != key}, "lacks 1 weights"),
    "unknown": (lambda w, key: {**w, "extra.weight": torch.ones(1)}, "has unknown 1 weights"),
    "prefix": (lambda w, key: {f"model.{k}": v for k, v in w.items()}, "lacks .* and has unknown"),
    "shape": (lambda w, key: {**w, key: w[key][:1]}, "needed is"),
    "flat": (lambda w, key: {**w, key: w[key].flatten()}, "needed is"),
    "integers": (lambda w, key: {**w, key: w[key].to(torch.int8)}, "are in I8"),
    "nan": (lambda w, key: {**w, key: w[key] * float("nan")}, "NaN or infinity"),
    "infinity": (lambda w, key: {**w, key: w[key] + float("inf")}, "NaN or infinity"),
    "empty": (lambda w, key: {}, "lacks"),
}
KEYS = {
    "unet": "down_blocks.0.resnets.0.conv1.weight",
    "vae": "encoder.conv_in.weight",
    "text_encoder": "embeddings.token_embedding.weight",
    "text_encoder_2": "text_projection.weight",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", KEYS)
def test_weights_that_do_not_fit_their_config_are_refused(
    tiny_sdxl_folder, sdxl_parts, tmp_path, part, change
):
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    state = weights_of(folder, part)
    key = next(name for name in state if name.endswith(KEYS[part]))
    alter, message = CHANGES[change]
    write_weights(folder, part, alter(state, key))
    with pytest.raises(BackboneError, match=message):
        load_backbone(folder, **others(sdxl_parts, part))
    if part == "unet":
        with pytest.raises(BackboneError, match=message):
            load_backbone(folder, keep_taps=["mid_block"])


def test_layers_that_a_config_does_not_have_are_refused_and_those_it_lacks(folder):
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    for layers, verb in ((1, "has unknown"), (3, "lacks")):
        path.write_text(json.dumps({**config, "num_hidden_layers": layers}))
        with pytest.raises(BackboneError, match=rf"{verb} 16 weights, such as .*layers\.[12]"):
            load_backbone(folder)


def test_a_weight_beyond_the_type_s_range_is_refused(folder):
    state = weights_of(folder, "unet")
    write_weights(folder, "unet", {**state, "conv_in.bias": state["conv_in.bias"] + 1e6})
    load_backbone(folder)
    with pytest.raises(BackboneError, match=r"infinity in 'conv_in\.bias' as torch\.float16"):
        load_backbone(folder, dtype=torch.float16)


def test_a_text_encoder_is_read_under_the_names_of_every_version(
    tiny_sdxl_folder, sdxl_parts, tmp_path
):
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "model")
    for part in ("text_encoder", "text_encoder_2"):
        rest, expected = others(sdxl_parts, part), sdxl_parts[part].state_dict()
        plain = {k.removeprefix("text_model."): v for k, v in weights_of(folder, part).items()}
        ids = {"embeddings.position_ids": torch.arange(77)[None]}
        apart = {k: v for k, v in plain.items() if k.startswith("text_projection")}
        inner = {k: v for k, v in plain.items() if k not in apart} | ids
        prefixed = {f"text_model.{k}": v for k, v in inner.items()} | apart
        beside = {"logit_scale": torch.ones(()), "vision_model.x.weight": torch.ones(2)}
        for state in (inner | apart, prefixed, prefixed | beside):
            write_weights(folder, part, state)
            read = load_backbone(folder, **rest).parts()[part].state_dict()
            assert read.keys() == expected.keys()
            assert all(torch.equal(read[key], value) for key, value in expected.items())
        twice = {"text_model.final_layer_norm.bias": plain["final_layer_norm.bias"].clone()}
        write_weights(folder, part, inner | apart | twice)
        with pytest.raises(BackboneError, match="one of them twice"):
            load_backbone(folder, **rest)
        write_weights(folder, part, prefixed)


def test_a_projection_that_sd_2_does_not_read_is_left_out(tiny_sd21_folder, tmp_path):
    folder = shutil.copytree(tiny_sd21_folder, tmp_path / "model")
    state = weights_of(folder, "text_encoder")
    write_weights(folder, "text_encoder", {**state, "text_projection.weight": torch.ones(16, 16)})
    assert same(states(load_backbone(folder)), states(load_backbone(tiny_sd21_folder)))


def test_the_attention_of_the_vae_is_read_under_its_first_names(folder, expected):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in weights_of(folder, "vae").items():
        first = name
        for new, word in old.items():
            if ".attentions." in name:
                first = first.replace(f".{new}.", f".{word}.")
        renamed[first] = value
    assert any("proj_attn" in name for name in renamed)
    write_weights(folder, "vae", renamed)
    assert same(states(load_backbone(folder)), expected)
    theirs = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in expected["vae"].items())


def test_what_pipelines_ignore_is_ignored(folder):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{")
    load_backbone(folder)


def test_a_truncated_folder_is_read_with_its_taps_alone(folder, tmp_path):
    encoder = DiffusionEncoder.from_pretrained(folder, taps="mid_block", size=64, truncate=True)
    encoder.save_pretrained(tmp_path / "short", include_backbone=True)
    DiffusionEncoder.from_pretrained(tmp_path / "short")
    with pytest.raises(BackboneError, match="lacks"):
        load_backbone(tmp_path / "short" / "backbone")


CONFIGS = [
    ("unet", [], "must hold an object"),
    (
        "unet",
        {"block_out_channels": "x"},
        "block_out_channels must be a whole number or a list, got 'x'",
    ),
    ("unet", {"block_out_channels": [8, -8, 16, 16]}, "must be positive"),
    ("unet", {"block_out_channels": [10**9, 8, 16, 16]}, "16777216 at most"),
    ("unet", {"layers_per_block": 10**7}, "128 at most"),
    ("unet", {"use_linear_projection": "yes"}, "must be true or false"),
    ("unet", {"norm_num_groups": 3}, "num_channels"),
    ("unet", {"act_fn": "grelu"}, "grelu"),
    ("unet", {"down_block_types": ["Nonsense"] * 4}, "Nonsense"),
    ("unet", {"attention_head_dim": None, "_class_name": "FluxTransformer2DModel"}, "Flux"),
    ("vae", {"scaling_factor": -1}, "scaling_factor must be positive"),
    ("vae", {"scaling_factor": float("nan")}, "must be finite"),
    ("vae", {"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
    ("text_encoder", {"num_hidden_layers": 10**9}, "128 at most"),
    ("text_encoder", {"hidden_size": 16.5}, "hidden_size must be a whole number"),
    ("text_encoder", {"model_type": "t5"}, "it is of a t5"),
    ("text_encoder", {"hidden_act": "none"}, "text_encoder"),
    ("scheduler", {"num_train_timesteps": 10**12}, "100000 at most"),
    ("scheduler", {"beta_start": "low"}, "beta_start must be a number"),
]


@pytest.mark.parametrize(("part", "change", "message"), CONFIGS)
def test_configs_of_nonsense_are_refused_by_their_values(folder, part, change, message):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **change} if change else []))
    with pytest.raises(DiffencError, match=re.escape(message)):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "attention_head_dim"),
        ("unet", "norm_num_groups"),
        ("vae", "block_out_channels"),
        ("vae", "norm_num_groups"),
        ("text_encoder", "num_attention_heads"),
        ("text_encoder", "hidden_act"),
    ],
)
def test_values_that_would_take_a_default_in_silence_must_be_there(folder, part, key):
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=f"{part} of .* lacks {key}"):
        load_backbone(folder)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_tokenizer_without_all_its_merges_is_refused(folder, damage):
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").unlink(missing_ok=True)
    vocab = {token: i for i, token in enumerate(["a", "b</w>", "ab</w>", "<|x|>"])}
    (tokenizer / "vocab.json").write_text(json.dumps(vocab))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    if damage == "gone":
        (tokenizer / "merges.txt").unlink()
    with pytest.raises(BackboneError, match="holds no whole tokenizer"):
        load_backbone(folder)


def test_plain_pipelines_agree_with_a_sharded_folder(folder, sd_parts):
    """The folder in shards is one that diffusers reads too, to the same weights."""
    into_shards(
        folder,
        "unet",
        f"{STEM}.safetensors.index.json",
        STEM + "-{number:05d}-of-00002.safetensors",
    )
    theirs = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    own = load_backbone(folder, **others(sd_parts, "unet")).unet.state_dict()
    assert all(torch.equal(own[key], value) for key, value in theirs.items())
