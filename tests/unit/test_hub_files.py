"""What is fetched from the Hub: the files that will be read, found by what a repository lists."""

import fnmatch
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffenc.errors import BackboneError
from diffenc.mllm.language import load_language_model
from diffenc.models import list_taps, load_backbone, resolve_folder
from diffenc.storage.pretrained import pretrained_source

STEM = "diffusion_pytorch_model"
NAME = "owner/model"


@dataclass
class Hub:
    """Repositories in folders, and what was fetched of them."""

    cache: Path
    repositories: dict[tuple[str, str | None], Path] = field(default_factory=dict)
    requests: tuple[str, ...] = ()
    online: bool = True

    def model_info(self, hub_id, *, revision=None, **_):
        if not self.online or (hub_id, revision) not in self.repositories:
            raise ConnectionError("no such repository, or no network")
        root = self.repositories[hub_id, revision]
        names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(
        self, hub_id, *, revision=None, allow_patterns=("*",), local_files_only=False
    ):
        target = self.cache / hub_id / (revision or "main").replace("/", "-")
        if local_files_only or not self.online:
            if not target.is_dir():
                raise FileNotFoundError("not in the cache")
            return str(target)
        root = self.repositories[hub_id, revision]
        for path in root.rglob("*"):
            name = str(path.relative_to(root))
            if path.is_file() and any(fnmatch.fnmatch(name, each) for each in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        return str(target)

    def get_repo_discussions(self, hub_id, **filters):
        assert filters["author"] == "SFconvertbot"
        return iter(SimpleNamespace(git_reference=each) for each in self.requests)

    def fetched(self, hub_id=NAME, revision="main") -> set[str]:
        root = self.cache / hub_id / revision
        return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}

    def weights(self, *place) -> set[str]:
        return {name for name in self.fetched(*place) if name.endswith((".safetensors", ".bin"))}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    fake = Hub(tmp_path / "cache")
    for name in ("model_info", "get_repo_discussions"):
        method = getattr(fake, name)
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda _self, *a, method=method, **k: method(*a, **k)
        )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "real-cache"))
    return fake


@pytest.fixture
def sdxl(tiny_sdxl_folder, tmp_path, hub) -> Path:
    """A repository as SDXL's: full files, half ones, and what nobody needs here."""
    folder = Path(shutil.copytree(tiny_sdxl_folder, tmp_path / "repository"))
    for path in list(folder.rglob("*.safetensors")):
        halves = {name: value.half() for name, value in load_file(path).items()}
        name = path.name.replace(".safetensors", ".fp16.safetensors")
        save_file(halves, path.with_name(name), {"format": "pt"})
        path.with_name("openvino_model.bin").write_text("nothing")
        path.with_name(path.name.replace(".safetensors", "_ema.safetensors")).write_text("nothing")
    (folder / "sd_xl_base_1.0.safetensors").write_text("nothing")
    (folder / "vae_1_0").mkdir()
    (folder / "vae_1_0" / f"{STEM}.safetensors").write_text("nothing")
    hub.repositories[NAME, None] = folder
    return folder


def named(word: str, *parts: str) -> set[str]:
    files = {"unet": STEM, "vae": STEM, "text_encoder": "model", "text_encoder_2": "model"}
    return {f"{part}/{files[part]}{word}.safetensors" for part in parts or files}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, named("")),
        (torch.bfloat16, named("")),
        # The VAE overflows in float16 and stays in float32, so it is fetched in full.
        (
            torch.float16,
            named(".fp16", "unet", "text_encoder", "text_encoder_2") | named("", "vae"),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "names",
)
def test_the_files_of_the_dtype_are_fetched_and_no_others(hub, sdxl, dtype, expected):
    resolve_folder(NAME, dtype=dtype)
    assert hub.weights() == expected
    backbone = load_backbone(NAME, dtype=dtype)
    assert backbone.dtype == dtype
    assert hub.weights() == expected


def test_a_variant_is_fetched_where_it_is_named(hub, sdxl):
    (sdxl / "vae" / f"{STEM}.fp16.safetensors").unlink()
    resolve_folder(NAME, variant="fp16")
    expected = named(".fp16", "unet", "text_encoder", "text_encoder_2") | named("", "vae")
    assert hub.weights() == expected
    with pytest.raises(BackboneError, match="no weights of the variant 'ema'"):
        resolve_folder(NAME, variant="ema")


def test_taps_are_listed_without_weights_and_parts_that_are_given_are_not_fetched(hub, sdxl):
    assert list_taps(NAME) == list_taps(sdxl)
    assert hub.weights() == set()
    unet = sdxl / "unet" / f"{STEM}.safetensors"
    load_backbone(NAME, unet=unet, vae=sdxl / "vae")
    assert hub.weights() == named("", "text_encoder", "text_encoder_2")


def test_shards_are_fetched_by_their_index(hub, sdxl):
    state = load_file(sdxl / "unet" / f"{STEM}.safetensors")
    (sdxl / "unet" / f"{STEM}.safetensors").unlink()
    places = {}
    for number in (1, 2):
        file = f"{STEM}-0000{number}-of-00002.safetensors"
        own = {name: state[name] for name in sorted(state)[number - 1 :: 2]}
        save_file(own, sdxl / "unet" / file, {"format": "pt"})
        places |= dict.fromkeys(own, file)
    (sdxl / "unet" / f"{STEM}-00003-of-00003.safetensors").write_text("of another")
    index = sdxl / "unet" / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    own = load_backbone(NAME).unet.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert {n for n in hub.weights() if n.startswith("unet/")} == {
        f"unet/{file}" for file in places.values()
    }


@pytest.mark.parametrize("name", ["../vae/x.safetensors", "/etc/x.safetensors", "a/../../x"])
def test_an_index_on_the_hub_names_nothing_outside_its_folder(hub, sdxl, name):
    index = sdxl / "unet" / f"{STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(BackboneError, match="stay within the folder"):
        load_backbone(NAME)
    assert hub.weights() == set()


def test_half_precision_alone_is_fetched(hub, sdxl):
    for name in named(""):
        (sdxl / name).unlink()
    with pytest.warns(UserWarning, match="in half precision alone"):
        load_backbone(NAME)
    assert hub.weights() == named(".fp16")


def test_a_repository_of_pickles_is_refused_before_they_are_fetched(hub, sdxl):
    for path in (sdxl / "unet").glob("*.safetensors"):
        path.unlink()
    (sdxl / "unet" / f"{STEM}.bin").write_bytes(b"pickled")
    with pytest.raises(BackboneError, match=r"\.bin, a format that can run code"):
        load_backbone(NAME)
    assert hub.weights() == set()


@pytest.mark.long
def test_without_network_the_cache_is_read(hub, sdxl):
    online = load_backbone(NAME, dtype=torch.float16).unet.state_dict()
    hub.online = False
    offline = load_backbone(NAME, dtype=torch.float16).unet.state_dict()
    assert all(torch.equal(online[name], value) for name, value in offline.items())
    # What the cache has in half precision alone is read for more, and said.
    with pytest.warns(UserWarning, match="in half precision alone"):
        load_backbone(NAME)


def test_a_mirror_is_taken_where_the_first_repository_is_gone(hub, sdxl, monkeypatch):
    from diffenc.models import sources

    alias = sources.BackboneSource("tiny", ("gone/model", NAME), "")
    monkeypatch.setitem(sources.SOURCES, "tiny", alias)
    assert resolve_folder("tiny") == hub.cache / NAME / "main"


def test_language_models_are_fetched_by_the_same_rule(hub, tmp_path):
    folder = Path(shutil.copytree(pretrained_source("shapes-lm"), tmp_path / "repository"))
    weights = load_file(folder / "model.safetensors")
    halves = {name: value.half() for name, value in weights.items()}
    save_file(halves, folder / "model.fp16.safetensors", {"format": "pt"})
    (folder / "pytorch_model.bin").write_text("nothing")
    (folder / "own.py").write_text("raise SystemExit")
    hub.repositories[NAME, None] = folder
    load_language_model(NAME, dtype=torch.float16)
    assert hub.weights() == {"model.fp16.safetensors"}
    model, _ = load_language_model(NAME)
    assert hub.weights() == {"model.fp16.safetensors", "model.safetensors"}
    assert "own.py" not in hub.fetched()
    assert model.name_or_path == NAME


def test_pickled_models_are_read_from_the_hub_s_own_conversion(hub, tmp_path):
    good = Path(pretrained_source("shapes-lm"))
    pickled = Path(shutil.copytree(good, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub.repositories = {(NAME, None): pickled, (NAME, "refs/pr/7"): good}
    with pytest.raises(BackboneError, match=r"pytorch_model\.bin, a format that can run code"):
        load_language_model(NAME)
    hub.requests = ("refs/pr/7",)
    load_language_model(NAME)
    assert hub.weights() == set()
    assert hub.weights(NAME, "refs-pr-7") == {"model.safetensors"}


@pytest.mark.parametrize("main", [True, False])
def test_a_cache_of_the_hub_is_read_through_its_links(tmp_path, monkeypatch, main):
    """A cache laid out by hand as huggingface_hub does it, offline."""
    good, root = Path(pretrained_source("shapes-lm")), tmp_path / "models--owner--model"
    (root / "blobs").mkdir(parents=True)
    for revision, names in (
        ("main", [p.name for p in good.iterdir() if main or p.suffix != ".safetensors"]),
        ("refs/pr/7", [p.name for p in good.iterdir()]),
    ):
        commit = "1" * 40 if revision == "main" else "2" * 40
        (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        (root / "snapshots" / commit).mkdir(parents=True)
        for name in names:
            shutil.copy(good / name, root / "blobs" / name)
            (root / "snapshots" / commit / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_language_model(NAME)
