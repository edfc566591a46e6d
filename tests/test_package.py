"""What holds for the package and the repository as a whole."""

import re
import subprocess
import sys
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import diffenc
from diffenc.storage.reading import tomllib

ROOT = Path(__file__).parents[1]

# Extras, and what is too heavy to load before it is asked for.
OPTIONAL = ("gradio", "matplotlib", "pyarrow")
HEAVY = ("diffusers", "transformers", "peft", "accelerate", "torchvision", *OPTIONAL)

IMPORT_EVERYTHING = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # as if not installed
import diffenc
for module in pkgutil.walk_packages(diffenc.__path__, "diffenc."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_sorted_and_equals_what_can_be_imported():
    assert list(diffenc.__all__) == sorted(diffenc.__all__) == sorted(dir(diffenc))
    assert set(diffenc.__all__) - {"__version__"} == diffenc._HOMES.keys()
    for name in diffenc.__all__:
        value = getattr(diffenc, name)
        assert getattr(value, "__name__", name) == name
    with pytest.raises(AttributeError, match="no attribute 'Encoder'"):
        diffenc.Encoder  # noqa: B018
    assert diffenc.__version__ == version("diffenc")


def test_the_changelog_is_headed_by_the_version():
    first = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first is not None
    assert first[1] == diffenc.__version__


@pytest.mark.long
def test_every_module_imports_without_extras():
    run_python(IMPORT_EVERYTHING)


def test_importing_the_package_is_light():
    loaded = run_python("import diffenc.cli.main, sys; print(*sys.modules)").split()
    assert not {name.partition(".")[0] for name in loaded} & {"torch", *HEAVY}


@pytest.mark.long
def test_importing_the_encoder_costs_torch_and_nothing_heavier():
    loaded = run_python("from diffenc import DiffusionEncoder; import sys; print(*sys.modules)")
    assert not {name.partition(".")[0] for name in loaded.split()} & set(HEAVY)


def test_imports_follow_the_layers(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [
        *project["project"]["dependencies"],
        *chain.from_iterable(project["project"]["optional-dependencies"].values()),
        *chain.from_iterable(project["dependency-groups"].values()),
    ]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements} - {"diffenc"}
    files = ("constraints.txt", "constraints-app.txt")
    texts = [(ROOT / name).read_text() for name in files]
    pinned = set(re.findall(r"^([\w-]+)==\S+$", "\n".join(texts), re.MULTILINE))
    assert names <= pinned


def test_no_file_names_a_place_on_one_machine():
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    absolute = re.compile(rb"(?<![\w.~-])/(?:root|work)/")
    found = [
        name
        for name in filter(None, done.stdout.split("\0"))
        if (path := ROOT / name).is_file()
        and b"\0" not in (content := path.read_bytes())
        and absolute.search(content)
    ]
    assert found == []
