"""Which classes of transformers take a tower is what the page says, and the others say why not."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import transformers
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration
from transformers.models.auto import modeling_auto

import tiny_llava
from diffenc.errors import ConfigError
from diffenc.hosts.transformers import DiffEncConfig, require_tower

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results" / "transformers-hosts.md").read_text("utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", PAGE, flags=re.MULTILINE))
VERSION = re.search(r"of transformers (\S+) knows", PAGE)[1]  # type: ignore[index]
needs_its_version = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"the page is of transformers {VERSION}"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "transformers_hosts", ROOT / "tools" / "transformers_hosts.py"
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def kind_of(name: str) -> str:
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return next(kind for kind, each in names.items() if each == name)


@needs_its_version
def test_the_page_has_every_class():
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert set(ROWS) == set(names.values())


@needs_its_version
@pytest.mark.parametrize(
    "name",
    ["AyaVisionForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"],
)
def test_picture_and_question_reach_classes_that_work(tool, name):
    assert tool.attempt(getattr(transformers, name), kind_of(name))[0] == ROWS[name] == "yes"


@needs_its_version
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, works in ROWS.items() if works == "yes"])
def test_picture_and_question_reach_every_class_that_works(tool, name):
    assert tool.attempt(getattr(transformers, name), kind_of(name))[0] == "yes"


def test_what_a_host_reads_of_its_own_tower_is_refused_with_the_page_that_says_more():
    config = DiffEncConfig("diffenc:shapes")
    with pytest.raises(AttributeError, match=r"spatial_merge_size.*In which host"):
        _ = config.spatial_merge_size
    assert not hasattr(config, "spatial_merge_size")


def test_a_tower_is_there_or_its_absence_is_told():
    llava = tiny_llava.build("diffenc:shapes")
    assert require_tower(llava) is tiny_llava.tower_of(llava)
    llava.config.vision_config = CLIPVisionConfig()
    tiny_llava.inner(llava).vision_tower = None
    assert isinstance(llava, LlavaForConditionalGeneration)
    with pytest.raises(ConfigError, match=r"no vision tower.*is a CLIPVisionConfig"):
        require_tower(llava)


def test_a_transformers_that_is_too_old_for_stock_classes_is_refused(monkeypatch) -> None:
    oldest = importlib.import_module("diffenc.hosts.transformers._oldest")
    monkeypatch.setattr(transformers, "__version__", "4.44.2")
    with pytest.raises(ConfigError, match=r"needs transformers 4\.48\.3 or newer, and 4\.44\.2"):
        importlib.reload(oldest)
    monkeypatch.undo()
    importlib.reload(oldest)
