"""Examples in docstrings run as they stand, and print what stands below them.

They may use `circle`, `square` and `picture`, drawings of 64 x 64 pixels, and `folder`, an empty
one; every other name is the module's own or imported in the example.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import diffenc
from diffenc.errors import ConfigError
from diffenc.shapes import Scene, SceneObject, render

ROOT = Path(diffenc.__file__).parent
LEFT_OUT = "diffenc.studies."
"""Start of the names of examples that are not run: studies take minutes."""
REFUSED = set()
"""Modules that refuse the installed transformers, where it is too old for them."""


def _module_name(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def _examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for path in sorted(ROOT.rglob("*.py")):
        if ">>> " in path.read_text("utf-8"):
            try:
                module = importlib.import_module(_module_name(path))
            except ConfigError as error:
                if "newer, and" not in str(error):  # "needs ... or newer, and ... is installed"
                    raise
                REFUSED.add(_module_name(path))
                continue
            yield from (test for test in finder.find(module) if test.examples)


EXAMPLES = {example.name: example for example in _examples()}


@pytest.fixture(scope="module")
def drawings():
    circle, square = (
        render(Scene((SceneObject(shape, color, "large", 0.5, 0.5, 0.25),)))
        for shape, color in (("circle", "red"), ("square", "blue"))
    )
    return {"circle": circle, "square": square, "picture": circle}


@pytest.mark.parametrize(
    "name", [name for name in sorted(EXAMPLES) if not name.startswith(LEFT_OUT)]
)
def test_the_example_prints_what_it_says(name, drawings, tmp_path):
    example = EXAMPLES[name]
    example.globs |= {**drawings, "folder": tmp_path}
    report: list[str] = []
    doctest.DocTestRunner().run(example, out=report.append)
    assert not report, "".join(report)


def test_examples_stand_in_sections_that_the_documentation_shows():
    heading = re.compile(r"^ *Example:$", flags=re.MULTILINE)
    paths = [path for path in ROOT.rglob("*.py") if heading.search(path.read_text("utf-8"))]
    subjects = {path.relative_to(ROOT).parts[0] for path in paths}
    assert subjects == set()


def test_every_prompt_of_an_example_is_found_and_run():
    lines = {
        _module_name(path): len(re.findall(r"^ *>>> ", path.read_text("utf-8"), re.MULTILINE))
        for path in ROOT.rglob("*.py")
        if _module_name(path) not in REFUSED
    }
    counts = dict.fromkeys(lines, 0)
    for example in EXAMPLES.values():
        counts[_module_name(Path(example.filename))] += len(example.examples)
    assert counts == lines
