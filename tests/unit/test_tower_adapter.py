import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.builders import tiny_unet

from diffenc.denoiser.attention import cross_attention_layers
from diffenc.denoiser.lora import lora_parameters
from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.hosts.adapter import ADAPTER_FILE, Adapter, adapted_layers, load_state
from diffenc.hosts.checkpoints import adapter_weights, find_adapter
from diffenc.hosts.spec import TowerSpec
from diffenc.hosts.tower import DiffusionVisionTower

ADAPTED = "diffenc:shapes?rank=2"


def filled(value: float = 0.5, name: str = ADAPTED) -> DiffusionVisionTower:
    tower = DiffusionVisionTower(name, delay_load=True)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(value)
    return tower


def run(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return unet(sample, 50, torch.randn(2, 5, 8, generator=generator)).sample


@pytest.mark.parametrize("taps", [["up_blocks.1"], ["mid_block"], ["up_blocks.0.resnets.0"]])
def test_the_layers_are_those_with_a_gradient_at_the_taps(taps) -> None:
    unet = tiny_unet().requires_grad_(True)
    found = adapted_layers(dict(unet.config), taps)
    outputs = []
    handles = [
        unet.get_submodule(tap).register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for tap in taps
    ]
    run(unet)
    sum(out.sum() for out in outputs).backward()
    for handle in handles:
        handle.remove()
    projections = [
        f"{path}.{part}"
        for path in cross_attention_layers(unet)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    expected = [p for p in projections if unet.get_submodule(p).weight.grad is not None]
    assert [layer.path for layer in found] == expected
    for layer in found:
        linear = unet.get_submodule(layer.path)
        assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)


def test_latents_alone_leave_nothing_to_adapt() -> None:
    with pytest.raises(ConfigError, match="nothing to adapt"):
        DiffusionVisionTower("diffenc:shapes?taps=latents&rank=2", delay_load=True)


def test_the_registered_parameters_are_those_that_peft_runs() -> None:
    unet = tiny_unet()
    adapter = Adapter(adapted_layers(dict(unet.config), ["up_blocks.1"]), rank=2, alpha=4)
    plain = run(unet)
    adapter.inject(unet)
    assert torch.equal(run(unet), plain)
    inside = {id(p) for p in lora_parameters(unet, "tower").values()}
    assert inside == {id(p) for p in adapter.parameters()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.05)
    changed = run(unet)
    by_hand = tiny_unet()
    state = by_hand.state_dict()
    for index, layer in enumerate(adapter.layers):
        down, up = getattr(adapter, f"{index}_down"), getattr(adapter, f"{index}_up")
        state[f"{layer.path}.weight"] += 2.0 * up.detach() @ down.detach()  # alpha / rank
    by_hand.load_state_dict(state)
    torch.testing.assert_close(changed, run(by_hand), atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_adapters_are_made_alike_whatever_the_default_dtype_and_device() -> None:
    first = DiffusionVisionTower(ADAPTED, delay_load=True).state_dict()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            second = DiffusionVisionTower(ADAPTED, delay_load=True).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {value.dtype for value in second.values()} == {torch.float32}
    other = DiffusionVisionTower(f"{ADAPTED}&seed=1", delay_load=True).state_dict()
    assert not torch.equal(first["adapter.0_down"], other["adapter.0_down"])


def test_what_is_saved_comes_back(tmp_path) -> None:
    path = filled(0.5).save_adapter(tmp_path)
    assert path.name == ADAPTER_FILE
    for source in (path, tmp_path):
        fresh = DiffusionVisionTower(ADAPTED, delay_load=True)
        before = dict(fresh.named_parameters())
        assert fresh.load_adapter(source)
        assert all(p is before[name] for name, p in fresh.named_parameters())
        assert all((p == 0.5).all() for p in fresh.parameters())


@pytest.mark.parametrize(
    "other", ["&taps=up0", "&alpha=7", "&rank=3", "&taps=up0a1+up1a1", ""], ids=str
)
def test_the_adapter_of_another_tower_is_refused(other, tmp_path) -> None:
    filled().save_adapter(tmp_path)
    name = "diffenc:shapes?rank=3" if other == "&rank=3" else ADAPTED + other
    tower = DiffusionVisionTower(name, delay_load=True)
    if not other:
        assert tower.load_adapter(tmp_path)
        return
    with pytest.raises(ConfigError, match="another tower"):
        tower.load_adapter(tmp_path)


def test_options_that_do_not_touch_the_weights_may_differ(tmp_path) -> None:
    filled().save_adapter(tmp_path)
    tower = DiffusionVisionTower(f"{ADAPTED}&t=100&cond=cfg&grid=4", delay_load=True)
    assert tower.load_adapter(tmp_path)


def test_the_checkpoints_of_hosts_are_searched(tmp_path) -> None:
    state = {f"model.vision_tower.{k}": v for k, v in filled(0.25).state_dict().items()}
    state["model.mm_projector.0.weight"] = torch.zeros(2)
    state["model.vision_tower.adapter.note"] = torch.zeros(2)
    keys = sorted(state)
    (tmp_path / "shards").mkdir()
    for part in range(2):
        save_file(
            {key: state[key] for key in keys[part::2]},
            tmp_path / "shards" / f"model-0000{part + 1}-of-00002.safetensors",
        )
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("shards", "bin"):
        fresh = DiffusionVisionTower(ADAPTED, delay_load=True)
        assert fresh.load_adapter(tmp_path / folder)
        assert all((p == 0.25).all() for p in fresh.parameters())
    (tmp_path / "none").mkdir()
    assert not DiffusionVisionTower(ADAPTED, delay_load=True).load_adapter(tmp_path / "none")
    assert len(adapter_weights(state)) == 72


def test_a_checkpoint_with_adapters_of_two_towers_is_refused(tmp_path) -> None:
    state = {
        f"model.{place}vision_tower.{key}": value
        for place, number in (("", 0.25), ("aux.", 0.5))
        for key, value in filled(number).state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="holds adapters of several towers"):
        DiffusionVisionTower(ADAPTED, delay_load=True).load_adapter(tmp_path)


def test_the_side_file_wins_over_the_checkpoint(tmp_path) -> None:
    state = {f"model.vision_tower.{k}": v for k, v in filled(0.25).state_dict().items()}
    torch.save(state, tmp_path / "non_lora_trainables.bin")
    filled(0.75).save_adapter(tmp_path)
    fresh = DiffusionVisionTower(ADAPTED, delay_load=True)
    assert fresh.load_adapter(tmp_path)
    assert all((p == 0.75).all() for p in fresh.parameters())


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_broken_files_and_files_with_code_are_refused(tmp_path, capsys) -> None:
    spec = TowerSpec.parse(ADAPTED)
    with pytest.raises(BackboneError, match="no such"):
        find_adapter(tmp_path / "nowhere", spec)
    path = filled().save_adapter(tmp_path / "side")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BackboneError, match="cannot read"):
        find_adapter(tmp_path / "side", spec)
    (tmp_path / "evil").mkdir()
    torch.save(
        {"model.vision_tower.adapter.0_down": Evil()}, tmp_path / "evil" / "pytorch_model.bin"
    )
    with pytest.raises(BackboneError, match="not opened"):
        find_adapter(tmp_path / "evil", spec)
    assert "run" not in capsys.readouterr().out


def test_half_an_adapter_is_refused_and_changes_nothing(tmp_path) -> None:
    tower = filled(0.5)
    path = tower.save_adapter(tmp_path)
    state = load_file(path)
    state.pop("adapter.3_up")
    half = {key.removeprefix("adapter."): value for key, value in state.items()}
    fresh = DiffusionVisionTower(ADAPTED, delay_load=True)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(ConfigError, match="3_up"):
        load_state(fresh.adapter, half, path)
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())


def test_towers_without_an_adapter_say_so_and_files_in_the_way_too(tmp_path) -> None:
    plain = DiffusionVisionTower("diffenc:shapes", delay_load=True)
    with pytest.raises(ConfigError, match="rank=16"):
        plain.save_adapter(tmp_path)
    with pytest.raises(ConfigError, match="rank=16"):
        plain.load_adapter(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        filled().save_adapter(tmp_path / "file")
