import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffenc.errors import ConfigError, OutputError, ShapeError
from diffenc.projector import FusedProjector, Projector, projector_for


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
        ("identity", []),
    ],
)
def test_each_kind_has_the_layers_that_llava_names(kind, keys) -> None:
    projector = Projector(6, 6, kind)
    assert [key.removeprefix("layers.") for key in projector.state_dict()] == keys
    assert projector(torch.zeros(3, 5, 6)).shape == (3, 5, 6)


def test_the_two_layer_projector_is_llavas_by_hand(tokens) -> None:
    projector = Projector(6, 10)
    w = projector.state_dict()
    hidden = F.gelu(tokens @ w["layers.0.weight"].T + w["layers.0.bias"])
    expected = hidden @ w["layers.2.weight"].T + w["layers.2.bias"]
    torch.testing.assert_close(projector(tokens), expected)


def test_an_identity_changes_nothing_and_has_nothing_to_train(tokens) -> None:
    projector = Projector(6, 6, "identity")
    assert torch.equal(projector(tokens), tokens)
    assert not list(projector.parameters())


def test_norms_act_on_each_group_of_channels_apart(tokens) -> None:
    projector = Projector(6, 6, "identity", norm_channels=(2, 4))
    scaled = tokens * torch.tensor([1e3, 1e3, 1, 1, 1, 1])
    parts = [F.layer_norm(part, part.shape[-1:]) for part in scaled.split([2, 4], dim=-1)]
    torch.testing.assert_close(projector(scaled), torch.cat(parts, dim=-1))


def test_tokens_are_resampled_to_means(tokens) -> None:
    found = Projector(6, 6, "identity", grid=2)(tokens)
    maps = tokens.view(2, 4, 4, 6)
    expected = maps.view(2, 2, 2, 2, 2, 6).mean(dim=(2, 4)).reshape(2, 4, 6)
    torch.testing.assert_close(found, expected)
    one_image = Projector(6, 6, "identity", grid=(2, 4))(tokens[0])
    assert one_image.shape == (8, 6)
    several = Projector(6, 6, "identity", grid=2)(tokens.expand(3, 2, 16, 6))
    assert several.shape == (3, 2, 4, 6)


def test_tokens_of_another_precision_are_taken(tokens) -> None:
    assert Projector(6, 4)(tokens.half()).dtype == torch.float32
    assert Projector(6, 4).to(torch.bfloat16)(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "linear"},
        {"kind": "mlp3x_gelu", "norm_channels": (2, 4), "grid": (2, 3)},
    ],
)
def test_what_is_saved_comes_back(tmp_path, tokens, options) -> None:
    projector = Projector(6, 4, **options)
    projector.save_pretrained(tmp_path / "p")
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == [
        "projector.json",
        "projector.safetensors",
    ]
    again = Projector.from_pretrained(tmp_path / "p")
    assert torch.equal(again(tokens), projector(tokens))


class Host(nn.Module):
    """A LLaVA model's outermost names around its projector."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.mm_projector = projector


def llava_mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_llavas_own_file_is_read(tmp_path, tokens, prefix) -> None:
    host = Host(llava_mlp(6, 4))
    state = {prefix + key: value for key, value in host.state_dict().items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    projector = Projector(6, 4)
    projector.load_llava(tmp_path / "mm_projector.bin")
    assert torch.equal(projector(tokens), host.model.mm_projector(tokens))


def test_llava_reads_the_file_that_is_written(tmp_path, tokens) -> None:
    projector = Projector(6, 4)
    projector.save_llava(tmp_path / "mm_projector.bin")
    host = Host(llava_mlp(6, 4))
    state = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    host.load_state_dict(state, strict=True)
    assert torch.equal(projector(tokens), host.model.mm_projector(tokens))


def test_a_projector_of_another_width_is_refused_with_both_shapes(tmp_path) -> None:
    Projector(6, 4).save_llava(tmp_path / "mm_projector.bin")
    wrong = Projector(8, 4)
    before = {key: value.clone() for key, value in wrong.state_dict().items()}
    with pytest.raises(ShapeError, match=r"0\.weight \(4, 6\).*0\.weight \(4, 8\)"):
        wrong.load_llava(tmp_path / "mm_projector.bin")
    assert all(torch.equal(value, before[key]) for key, value in wrong.state_dict().items())
    with pytest.raises(ShapeError, match="linear"):
        Projector(6, 4, "linear").load_llava(tmp_path / "mm_projector.bin")


def test_files_that_hold_no_projector_are_refused(tmp_path) -> None:
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(ConfigError, match="holds no mm_projector"):
        Projector(6, 4).load_llava(tmp_path / "other.bin")
    (tmp_path / "broken.bin").write_bytes(b"nothing")
    for name in ("broken.bin", "missing.bin", "missing.safetensors"):
        with pytest.raises(ConfigError, match="cannot read"):
            Projector(6, 4).load_llava(tmp_path / name)


def test_a_file_with_several_projectors_is_refused(tmp_path) -> None:
    state = Host(llava_mlp(6, 4)).state_dict()
    copies = {f"saved.{key}": torch.zeros_like(value) for key, value in state.items()}
    torch.save({**state, **copies}, tmp_path / "two.bin")
    with pytest.raises(ConfigError, match=r"several projectors, model\.mm_projector\., saved"):
        Projector(6, 4).load_llava(tmp_path / "two.bin")


def test_a_file_with_code_in_it_is_not_run(tmp_path) -> None:
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model.mm_projector.0.weight": Payload()}, tmp_path / "bad.bin")
    with pytest.raises(ConfigError, match="cannot read"):
        Projector(6, 4).load_llava(tmp_path / "bad.bin")
    assert not (tmp_path / "ran").exists()


def test_half_saved_folders_are_refused(tmp_path) -> None:
    Projector(6, 4).save_pretrained(tmp_path)
    (tmp_path / "projector.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"projector\.safetensors"):
        Projector.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not hold"):
        Projector.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Projector(6, 4).save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Projector(6, 4, "mlp2_gelu"), "mlpNx_gelu"),
        (lambda: Projector(6, 4, "mlp0x_gelu"), "got .mlp0x_gelu."),
        (lambda: Projector(6, 4, "identity"), "keeps the width"),
        (lambda: Projector(0, 4), "in_features"),
        pytest.param(lambda: Projector(6, 4.0), "out_features", marks=pytest.mark.wrong_type),
        (lambda: Projector(6, 4, norm_channels=(2, 2)), "add up to in_features=6"),
        (lambda: Projector(6, 4, grid=(2, 0)), "grid"),
        (lambda: Projector(6, 4, grid=2).save_llava("x"), "no place"),
    ],
)
def test_bad_options_are_named(make, said) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_wrong_tokens_are_named(tokens) -> None:
    with pytest.raises(ShapeError, match=r"6 channels, got 5"):
        Projector(6, 4)(torch.zeros(1, 16, 5))
    with pytest.raises(ShapeError, match="15 tokens form no square"):
        Projector(6, 4, grid=2)(tokens[:, :15])


def test_gradients_reach_every_weight_and_the_tokens(tokens) -> None:
    projector = Projector(6, 4, norm_channels=(3, 3), grid=2)
    tokens.requires_grad_(True)
    projector(tokens).square().sum().backward()
    assert tokens.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


class Streams:
    """The sizes of an encoder, without one."""

    hidden_size, token_channels = 6, (2, 3, 1)
    stream_channels, clip_tokens = (2, 4), 5

    def __init__(self, how: str | None = None) -> None:
        if how:
            self.how = how


@pytest.mark.parametrize("how", ["tokens", "interleave"])
def test_each_stream_has_a_projector_of_its_own(tokens, how) -> None:
    projector = FusedProjector((2, 4), 3, "linear", how=how, first_tokens=5)
    (w1, b1), (w2, b2) = (
        (stream.layers.weight, stream.layers.bias) for stream in projector.streams
    )
    found = projector(tokens)
    for index in range(16):
        clips = index < 5 if how == "tokens" else index % 2 == 0
        token = tokens[:, index]
        expected = token[:, :2] @ w1.T + b1 if clips else token[:, 2:] @ w2.T + b2
        torch.testing.assert_close(found[:, index], expected)
    assert projector(tokens[0]).shape == (16, 3)


def test_the_other_streams_channels_are_not_read(tokens) -> None:
    projector = FusedProjector((2, 4), 3, how="interleave")
    other = tokens.clone()
    other[:, 0::2, 2:] = 7
    other[:, 1::2, :2] = 7
    assert torch.equal(projector(tokens), projector(other))


@pytest.mark.parametrize("how", ["tokens", "interleave"])
def test_a_fused_projector_that_is_saved_comes_back(tmp_path, tokens, how) -> None:
    projector = FusedProjector((2, 4), 3, how=how, first_tokens=5, norm_channels=((2,), (3, 1)))
    projector.save_pretrained(tmp_path)
    again = FusedProjector.from_pretrained(tmp_path)
    assert torch.equal(again(tokens), projector(tokens))
    with pytest.raises(ConfigError, match="does not hold"):
        Projector.from_pretrained(tmp_path)
    Projector(6, 4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not hold"):
        FusedProjector.from_pretrained(tmp_path)


def test_a_fused_projector_of_other_weights_is_refused(tmp_path) -> None:
    FusedProjector((2, 4), 3, how="interleave").save_pretrained(tmp_path)
    other = tmp_path / "other"
    FusedProjector((3, 3), 3, how="interleave").save_pretrained(other)
    (other / "projector.safetensors").replace(tmp_path / "projector.safetensors")
    with pytest.raises(ShapeError, match=r"streams\.0\.layers\.0\.weight \(3, 3\)"):
        FusedProjector.from_pretrained(tmp_path)


def test_gradients_reach_both_streams(tokens) -> None:
    projector = FusedProjector((2, 4), 3, how="interleave", norm_channels=((2,), (4,)))
    projector(tokens).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(
            lambda: FusedProjector((2, 4), 3, how="channel"),
            "how must be one of",
            marks=pytest.mark.wrong_type,
        ),
        (lambda: FusedProjector((2, 4), 3, how="tokens"), "first_tokens, which how='tokens' needs"),
        (lambda: FusedProjector((2, 4, 1), 3, how="interleave"), "two streams"),
        (lambda: FusedProjector((2, 4), 3, "mlp", how="interleave"), "mlpNx_gelu"),
        (
            lambda: FusedProjector((2, 4), 3, how="interleave", norm_channels=((1,), (4,))),
            "add up to in_features=2",
        ),
    ],
)
def test_bad_options_of_a_fused_projector_are_named(make, said) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_wrong_mixtures_are_named(tokens) -> None:
    with pytest.raises(ShapeError, match=r"2 \+ 4 channels, got 5"):
        FusedProjector((2, 4), 3, how="interleave")(tokens[..., :5])
    with pytest.raises(ShapeError, match="come in pairs, got 15"):
        FusedProjector((2, 4), 3, how="interleave")(tokens[:, :15])
    with pytest.raises(ShapeError, match="leaves none for the second"):
        FusedProjector((2, 4), 3, how="tokens", first_tokens=16)(tokens)


def test_the_projector_follows_the_encoder() -> None:
    plain = projector_for(Streams(), 3)
    assert isinstance(plain, Projector)
    assert (plain.in_features, plain.norm_channels) == (6, (2, 3, 1))
    assert projector_for(Streams(), 3, norm=False).norm_channels == ()
    assert isinstance(projector_for(Streams("channel"), 3), Projector)
    fused = projector_for(Streams("tokens"), 3, "linear")
    assert isinstance(fused, FusedProjector)
    assert (fused.in_features, fused.first_tokens, fused.kind) == ((2, 4), 5, "linear")
    assert fused.norm_channels == ((2,), (3, 1))
    assert projector_for(Streams("interleave"), 3, norm=False).norm_channels == ((), ())


def test_one_tap_alone_gets_no_norm_unless_asked() -> None:
    encoder = Streams()
    encoder.token_channels = (6,)
    assert projector_for(encoder, 3).norm_channels == ()
    assert projector_for(encoder, 3, norm=True).norm_channels == (6,)
