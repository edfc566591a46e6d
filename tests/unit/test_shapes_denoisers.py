"""The two kinds of denoiser of the miniature: what they predict, and what of a text they see."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from shapes_tools import FOLDER

sys.path.insert(0, str(FOLDER))

import train_denoiser
from denoisers import KINDS, SIGNAL, own_tokens
from train_denoiser import Text, unlike_changes
from training import mixed_precision

from diffenc.models.shapes import shapes_folder
from diffenc.shapes.pictures import NOUNS

SHAPE = (2, 4, 16, 16)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(KINDS))
def test_the_noise_is_found_from_a_prediction_that_is_right(name):
    latents, noise = drawn(0, *SHAPE), drawn(1, *SHAPE)
    steps = torch.tensor([50, 700])
    signal = SIGNAL[steps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    kind = KINDS[name]
    right = {"epsilon": noise, "sample": latents}[kind.predicts]
    states, own = torch.zeros(2, 32, 128), torch.ones(2, 32, dtype=torch.bool)
    perfect = type(kind)(**{**_fields(kind), "call": lambda *_: right})
    torch.testing.assert_close(
        perfect.noise(None, noisy, steps, states, own), noise, rtol=1e-4, atol=1e-4
    )


def _fields(kind):
    return {name: getattr(kind, name) for name in type(kind).__slots__}


@torch.no_grad()
@pytest.mark.parametrize(("name", "sees"), [("unet", True), ("transformer", False)])
def test_padding_is_seen_by_the_unet_alone(name, sees):
    torch.manual_seed(0)
    kind = KINDS[name]
    model = kind.build(16).eval()
    for weights in model.parameters():  # a fresh transformer's gates are closed
        weights.add_(0.05 * torch.randn_like(weights))
    text = Text(shapes_folder())
    ids = text.ids(["a red circle", "a large blue star left of a small green square"])
    own = own_tokens(ids)
    assert own.sum(dim=1).tolist() == [5, 12]  # with start and end
    states, steps, noisy = text.states(ids), torch.tensor([300, 300]), drawn(2, *SHAPE)
    before = kind.call(model, noisy, steps, states, own)
    padding = torch.where(own[..., None], states, drawn(3, *states.shape))
    after = kind.call(model, noisy, steps, padding, own)
    assert before.shape == torch.Size(SHAPE)
    assert torch.allclose(before, after, atol=1e-5) is not sees
    other = kind.call(model, noisy, steps, torch.where(own[..., None], -states, states), own)
    assert not torch.allclose(before, other, atol=1e-5)


def test_changes_like_the_teacher_s_cost_nothing_and_none_at_all_their_share():
    target = drawn(4, 6, 4, 8, 8)
    true = torch.tensor([1, 3])  # rows 4 and 5 are these again under false captions
    assert unlike_changes(target + 7.0, target, true) == pytest.approx(0.0, abs=1e-9)
    still = target.clone()
    still[4:] = still[true]
    sizes = (target[4:] - target[true]).square().mean(dim=(1, 2, 3))
    expected = (sizes / (sizes + 0.1 * sizes.mean())).mean()
    assert unlike_changes(still, target, true) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "teacher"), [("transformer", True), ("unet", False)])
def test_a_run_writes_averaged_weights_and_goes_on(tmp_path, monkeypatch, kind, teacher):
    model, run = tmp_path / "model", tmp_path / "run"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(shapes_folder() / part, model / part)
    monkeypatch.setattr(train_denoiser, "CHUNK", 20)
    monkeypatch.setattr(train_denoiser, "WINOGROUND_KINDS", ("noun",))
    options = ["--kind", kind, "--batch", "8", "--scenes", "20", "--threads", "1", "--colors"]
    options += ["--run", str(run), "--model", str(model)]
    options += ["--teacher", str(shapes_folder())] if teacher else []
    for steps in (2, 3):
        monkeypatch.setattr(sys, "argv", ["train_denoiser.py", *options, "--steps", str(steps)])
        train_denoiser.main()
    written = KINDS[kind].load(model / KINDS[kind].part)
    fresh = KINDS[kind].build(16)
    moved = [
        not torch.equal(old, new)
        for old, new in zip(fresh.parameters(), written.parameters(), strict=True)
    ]
    assert any(moved)
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == KINDS[kind].predicts
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 3]


def test_nouns_are_learnt_and_all_other_words_kept(extended_shapes):
    text = Text(extended_shapes)
    table = text.learn(NOUNS)
    before = table.weight.detach().clone()
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    text.states(text.ids(["a dog left of a red circle"])).square().sum().backward()
    optimizer.step()
    text.restore()
    dog, red = text.numbers(["dog", "red"])
    moved = (table.weight != before).any(dim=1)
    assert moved[dog]
    assert not moved[red]
    assert not moved[: len(Text(shapes_folder()).tokenizer)].any()


@pytest.mark.long
def test_a_run_on_little_pictures_marks_false_captions_and_learns_nouns(
    tmp_path, monkeypatch, extended_shapes
):
    model = tmp_path / "model"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(extended_shapes / part, model / part)
    words = load_file(model / "text_encoder" / "model.safetensors")
    monkeypatch.setattr(train_denoiser, "CHUNK", 20)
    monkeypatch.setattr(train_denoiser, "WINOGROUND_KINDS", ("noun",))
    options = ["--batch", "12", "--scenes", "20", "--threads", "1", "--colors", "--pictures", "1"]
    options += ["--crowds", "0.5", "--size", "64", "--learn-words", "--marked", "0.3"]
    options += ["--beside", "1", "--run", str(tmp_path / "run"), "--model", str(model)]
    monkeypatch.setattr(sys, "argv", ["train_denoiser.py", *options, "--steps", "2"])
    train_denoiser.main()
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert record["step"] == 2
    after = load_file(model / "text_encoder" / "model.safetensors")
    (name,) = [key for key in words if key.endswith("token_embedding.weight")]
    count = len(Text(shapes_folder()).tokenizer)
    assert torch.equal(after[name][:count], words[name][:count])
    assert not torch.equal(after[name][count:], words[name][count:])


class Kernels(TorchDispatchMode):
    """Notes the dtype that products of matrices and attention are computed in."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name in ("addmm", "scaled_dot_product"):
            if name in str(func):
                self.dtypes.setdefault(name, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(KINDS))
def test_products_are_halved_and_attention_is_not(name):
    torch.manual_seed(0)
    kind = KINDS[name]
    model = kind.build(16)
    with torch.no_grad():
        for weights in model.parameters():  # a fresh transformer's gates are closed
            weights.add_(0.05 * torch.randn_like(weights))
    inputs = drawn(0, *SHAPE), torch.tensor([50, 700]), drawn(1, 2, 32, 128)
    own = torch.ones(2, 32, dtype=torch.bool)
    with Kernels() as kernels, mixed_precision():
        half = kind.noise(model, *inputs, own).float()
    assert kernels.dtypes == {"addmm": {torch.bfloat16}, "scaled_dot_product": {torch.float32}}
    whole = kind.noise(model, *inputs, own)
    assert 0 < (half - whole).abs().mean() < 0.02 * whole.abs().mean()
    half.square().mean().backward()
    grads = [weights.grad for weights in model.parameters() if weights.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)
