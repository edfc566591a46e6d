import copy
import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.builders import tiny_unet

from diffenc.denoiser.attention import cross_attention_layers
from diffenc.denoiser.lora import (
    LoraOptions,
    add_lora,
    keep_precise,
    load_lora,
    lora_disabled,
    lora_names,
    lora_parameters,
    merge_lora,
    save_lora,
    set_lora,
    unmerge_lora,
)
from diffenc.errors import BackboneError, ConfigError, OutputError


@pytest.fixture
def unet():
    return tiny_unet()


def run(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 5, 8, generator=generator)
    return unet(sample, 50, states).sample


def shaken(unet, name="default") -> None:
    """An adapter as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(unet, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(unet, **options):
    add_lora(unet, cross_attention_layers(unet), LoraOptions(rank=2, **options))
    return unet


def test_a_new_adapter_changes_nothing(unet) -> None:
    before = run(unet)
    assert torch.equal(run(adapted(unet)), before)


def test_a_trained_adapter_is_the_sum_of_weights_by_hand(unet) -> None:
    plain = copy.deepcopy(unet)
    adapted(unet, alpha=6.0)
    shaken(unet)
    found = lora_parameters(unet, "default")
    state = plain.state_dict()
    for path, down in found.items():
        if ".lora_A." in path:
            up = found[path.replace("lora_A", "lora_B")]
            state[path.partition(".lora_A")[0] + ".weight"] += 3.0 * up @ down
    plain.load_state_dict(state)
    assert not torch.allclose(run(unet), run(tiny_unet()))
    torch.testing.assert_close(run(unet), run(plain), atol=1e-5, rtol=1e-5)


def test_gradients_are_where_they_should_be_and_nowhere_else(unet) -> None:
    adapted(unet)
    shaken(unet)
    run(unet).square().sum().backward()
    expected = set(lora_parameters(unet, "default"))
    assert len(expected) == 2 * 4 * len(cross_attention_layers(unet))
    with_gradient = {path for path, p in unet.named_parameters() if p.grad is not None}
    assert with_gradient == expected
    assert {path for path, p in unet.named_parameters() if p.requires_grad} == expected


def test_only_what_is_named_is_adapted(unet) -> None:
    first = cross_attention_layers(unet)[0]
    add_lora(unet, [first], LoraOptions(rank=1, projections=("to_v",)))
    assert sorted(lora_parameters(unet, "default")) == [
        f"{first}.to_v.lora_A.default.weight",
        f"{first}.to_v.lora_B.default.weight",
    ]


def test_adapters_are_switched_off_and_on_again_after_an_error_too(unet) -> None:
    plain = run(unet)
    adapted(unet)
    shaken(unet)
    changed = run(unet)
    with lora_disabled(unet):
        assert torch.equal(run(unet), plain)
    assert torch.equal(run(unet), changed)
    with pytest.raises(TypeError), lora_disabled(unet):
        unet()
    assert torch.equal(run(unet), changed)
    set_lora(unet, None)
    assert torch.equal(run(unet), plain)
    set_lora(unet, "default")
    assert torch.equal(run(unet), changed)


def test_several_adapters_live_in_one_model(unet) -> None:
    plain = run(unet)
    adapted(unet)
    shaken(unet)
    first = run(unet)
    add_lora(unet, cross_attention_layers(unet)[:1], LoraOptions(rank=1), name="other")
    assert lora_names(unet) == ["default", "other"]
    torch.testing.assert_close(run(unet), plain)  # a new one alone, and it changes nothing yet
    assert all(p.requires_grad for p in lora_parameters(unet, "default").values())
    set_lora(unet, "default")
    assert torch.equal(run(unet), first)


def test_merging_gives_the_same_features_and_is_undone(unet) -> None:
    plain = run(unet)
    adapted(unet)
    shaken(unet)
    changed = run(unet)
    merge_lora(unet)
    torch.testing.assert_close(run(unet), changed, atol=1e-5, rtol=1e-5)
    unmerge_lora(unet)
    set_lora(unet, None)
    torch.testing.assert_close(run(unet), plain, atol=1e-5, rtol=1e-5)


def test_what_is_saved_comes_back(unet, tmp_path) -> None:
    adapted(unet, alpha=5.0)
    shaken(unet)
    save_lora(unet, tmp_path)
    again = tiny_unet()
    load_lora(again, tmp_path, name="mine")
    assert torch.equal(run(again), run(unet))
    assert not any(p.requires_grad for p in again.parameters())
    load_lora(again, tmp_path, name="more", trainable=True)
    assert all(p.requires_grad for p in lora_parameters(again, "more").values())
    assert not any(p.requires_grad for p in lora_parameters(again, "mine").values())


@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}], ids=str)
def test_a_scale_that_was_changed_is_saved(unet, options, tmp_path) -> None:
    plain = copy.deepcopy(unet)
    shaken(adapted(unet, **options))
    layers = [layer for layer in unet.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.set_scale("default", 0.25)
    expected = run(unet)
    save_lora(unet, tmp_path)
    again = copy.deepcopy(plain)
    load_lora(again, tmp_path)
    torch.testing.assert_close(run(again), expected)
    torch.testing.assert_close(run(PeftModel.from_pretrained(plain, tmp_path)), expected)
    layers[0].set_scale("default", 2.0)
    with pytest.raises(ConfigError, match="layers of the adapter 'default' have the scales"):
        save_lora(unet, tmp_path)


def test_peft_itself_reads_the_folder(unet, tmp_path) -> None:
    adapted(unet, alpha=5.0)
    shaken(unet)
    save_lora(unet, tmp_path)
    read = PeftModel.from_pretrained(tiny_unet(), str(tmp_path))
    torch.testing.assert_close(run(read.base_model.model), run(unet), atol=1e-6, rtol=1e-5)


def test_diffusers_applies_the_file_keyed_for_it(unet, tmp_path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    adapted(unet, alpha=5.0)
    shaken(unet)
    save_lora(unet, tmp_path)
    state = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    plain = tiny_unet()
    before = run(plain)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=None, unet=plain)
    assert not torch.allclose(run(plain), before)
    torch.testing.assert_close(run(plain), run(unet), atol=1e-5, rtol=1e-5)


def test_the_adapter_stays_precise_in_a_half_precision_model(unet) -> None:
    adapted(unet.half())
    assert {p.dtype for p in lora_parameters(unet, "default").values()} == {torch.float32}
    unet.half()
    keep_precise(unet)
    assert {p.dtype for p in lora_parameters(unet, "default").values()} == {torch.float32}


def test_training_inside_autocast_moves_the_output(unet) -> None:
    adapted(unet, dropout=0.1)
    optimizer = torch.optim.Adam(lora_parameters(unet, "default").values(), lr=0.02)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(unet).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_adapters_for_other_models_are_refused_and_leave_the_model_alone(unet, tmp_path) -> None:
    adapted(unet)
    save_lora(unet, tmp_path)
    wider = type(unet).from_config({**unet.config, "cross_attention_dim": 16})
    keys = list(wider.state_dict())
    with pytest.raises(BackboneError, match="8"):
        load_lora(wider, tmp_path)
    assert list(wider.state_dict()) == keys
    shorter = tiny_unet()
    shorter.up_blocks = shorter.up_blocks[1:]
    with pytest.raises(BackboneError, match="another model, or for one cut"):
        load_lora(shorter, tmp_path)


def test_half_saved_folders_are_refused(unet, tmp_path) -> None:
    save_lora(adapted(unet), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(BackboneError, match="holds no LoRA adapter"):
        load_lora(tiny_unet(), tmp_path / "a")
    with pytest.raises(BackboneError, match="there is no folder"):
        load_lora(tiny_unet(), tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_lora(unet, tmp_path / "file")


def test_wrong_names_are_told(unet) -> None:
    adapted(unet)
    with pytest.raises(ConfigError, match="already"):
        adapted(unet)
    with pytest.raises(ConfigError, match=r"no adapter 'defalt'.*'default'"):
        set_lora(unet, "defalt")
    for name in ("train", "a.b", ""):
        with pytest.raises(ConfigError, match="must be letters"):
            add_lora(unet, cross_attention_layers(unet), LoraOptions(), name=name)
    with pytest.raises(ConfigError, match="nothing to adapt"):
        add_lora(tiny_unet(), [], LoraOptions())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank"),
        pytest.param({"rank": 2.0}, "rank must be an int", marks=pytest.mark.wrong_type),
        pytest.param({"alpha": -1}, "alpha", marks=pytest.mark.wrong_type),
        ({"dropout": 1.0}, "dropout"),
        ({"projections": ()}, "projections"),
        ({"projections": ("to_out",)}, r"to_out\.0"),
    ],
)
def test_options_out_of_range_are_told(options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraOptions(**options)


def changed_file(folder, name, change):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    "fingerprint",
    [[math.nan] * 6, [0.0] * 6, [], [1.0], "abc", [["1"]] * 6, None],
    ids=str,
)
def test_a_note_of_another_u_net_or_of_none_is_refused(unet, tmp_path, fingerprint) -> None:
    save_lora(adapted(unet), tmp_path)
    load_lora(tiny_unet(), tmp_path)
    changed_file(tmp_path, "diffenc.json", {"fingerprint": fingerprint})
    with pytest.raises(BackboneError, match=r"another backbone|is broken"):
        load_lora(tiny_unet(), tmp_path)


def test_a_u_net_of_nan_takes_no_adapter(unet, tmp_path) -> None:
    save_lora(adapted(unet), tmp_path)
    broken = tiny_unet()
    with torch.no_grad():
        broken.conv_in.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(BackboneError, match="another backbone"):
        load_lora(broken, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"r": "2"},
        {"r": True},
        {"lora_alpha": math.nan},
        {"lora_alpha": "4"},
        {"lora_alpha": None},
        {"lora_dropout": "much"},
        {"use_rslora": 1},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_a_config_of_other_types_is_refused(unet, tmp_path, change) -> None:
    save_lora(adapted(unet), tmp_path)
    changed_file(tmp_path, "adapter_config.json", change)
    plain = tiny_unet()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with pytest.raises(BackboneError, match=r"holds no LoRA adapter|no plain LoRA"):
        load_lora(plain, tmp_path)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("value", [math.nan, math.inf, "ints"])
def test_weights_that_are_no_numbers_are_refused(unet, tmp_path, value) -> None:
    save_lora(adapted(unet), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = sorted(state)[0]
    other = state[name].long() if value == "ints" else torch.full_like(state[name], value)
    save_file({**state, name: other}, path)
    with pytest.raises(BackboneError, match=r"NaN or infinity|int64"):
        load_lora(tiny_unet(), tmp_path)
