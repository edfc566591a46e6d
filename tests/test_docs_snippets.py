"""The code of README and of every page runs as a reader would paste it, in order, page by page."""

import contextlib
import io
import warnings

import pytest

import reader

DOCS = reader.ROOT / "docs"
LONG = ("studies.md", "choosing.md", "evaluate-language-models.md")
"""Pages whose code trains or studies models, which takes minutes or tens of seconds."""

PAGES = [
    pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [])
    for page in (reader.ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if reader.FENCE.search(page.read_text("utf-8"))
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return reader.Hub(tmp_path_factory.mktemp("hub"))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(reader.ROOT).as_posix())
def test_the_code_of_a_page_runs_in_order_and_prints_what_it_says(page, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with reader.desk(hub), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        namespace = reader.sit_down(page, hub)
        for block in reader.FENCE.finditer(page.read_text("utf-8")):
            reader.run(block, page, namespace)


def test_only_the_calls_of_other_libraries_are_not_run():
    fences = {
        (page.name, line.strip())
        for page in (reader.ROOT / "README.md", *DOCS.rglob("*.md"))
        for line in page.read_text("utf-8").splitlines()
        if line.strip().startswith(("```py", "~~~"))
    }
    others = {(page, fence) for page, fence in fences if fence not in ("```python", "```pycon")}
    assert others == {("coming-from.md", '```py title="before"')}
