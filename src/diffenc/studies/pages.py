"""Pages of the studies: blocks of Markdown, of which other pages include some by name."""

import textwrap
from collections.abc import Mapping
from typing import TypeVar

from diffenc.evals.tables import Table

Name = TypeVar("Name", bound=str)


def page(*blocks: str) -> str:
    """Join headings, paragraphs and tables, with an empty line between them; "" is left out."""
    return "\n\n".join(filter(None, (block.strip("\n") for block in blocks))) + "\n"


def section(name: str, *tables: Table) -> str:
    """Tables that another page can include by name, as pymdownx.snippets does."""
    start, end = (f"<!-- --8<-- [{side}:{name}] -->" for side in ("start", "end"))
    return page(start, *(table.to_markdown() for table in tables), end)


def paragraph(text: str) -> str:
    """A text in lines of 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def by_reason(missing: Mapping[Name, str]) -> dict[str, list[Name]]:
    """Names of what is missing, by the reason."""
    reasons: dict[str, list[Name]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
