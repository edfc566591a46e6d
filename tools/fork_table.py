"""The page docs/results/fork-hosts.md, from what tests/forks_run.py printed.

    python tests/forks_run.py <checkouts> ask > ask.jsonl
    python tests/forks_run.py <checkouts> train > train.jsonl
    python tools/fork_table.py ask.jsonl train.jsonl > docs/results/fork-hosts.md

Files of several environments may be given; of two lines on one fork under the same versions, the
later one counts.
"""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """# Forks of LLaVA

Each fork's own classes with a tiny language model of random weights, on the bundled miniature
diffusion model with an adapter of rank 4 (`diffenc:shapes?t=50&rank=4`), on a CPU, by the lines of
[A recipe for each fork](../guides/host-recipes.md) as `tests/forks_run.py` runs them. Packages that
only a fork's other towers import were replaced by empty ones (xformers).

"""
ASK = """## Asked

Three steps of AdamW at a rate of 0.01. Then the largest differences of logits: under another
question, and of a batch of two pictures with two questions against both alone. Then those of the
adapter and of the logits once the fork's own loader has read what was saved, in float16 as most
load. The same question twice gives the same logits and the same words everywhere; prismatic has no
words, as its own `generate` does not run on transformers 4.44.2.

| fork, commit | versions | loss | another question | batch | adapter, loaded | logits, loaded |
|---|---|---|---|---|---|---|
"""
TRAIN = """
## Trained

Four steps of the fork's own `train()` with prompts from the data (`question`); language model,
projector and adapter train. Then the adapter as the fork's loader brings it back.

| fork | versions | loss | largest weight that began at 0 | adapter, loaded |
|---|---|---|---|---|
"""
STOPPED = """
## Not run

| fork | versions | what | what stopped it |
|---|---|---|---|
"""


def read(paths: list[str]) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = {}
    for path in paths:
        for line in Path(path).read_text("utf-8").splitlines():
            row = json.loads(line)
            rows[row["fork"], row["versions"], row["what"]] = row
    return rows


def near(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def asked_row(row: dict[str, Any]) -> str:
    loading = [near(row[key]) if key in row else "" for key in LOADED]
    cells = [
        f"{row['fork']} {row['commit']}",
        row["versions"],
        f"{row['first loss']:.3f} to {row['last loss']:.3f}",
        near(row["other question"]),
        near(row["batch against singles"]),
        *loading,
    ]
    return f"| {' | '.join(cells)} |\n"


LOADED = ("adapter after loading", "logits after loading")


def trained_row(row: dict[str, Any]) -> str:
    losses = row["losses"]
    cells = [
        row["fork"],
        row["versions"],
        f"{losses[0]:.3f} to {losses[-1]:.3f}",
        near(row["adapter moved"]),
        near(row["adapter after loading"]),
    ]
    return f"| {' | '.join(cells)} |\n"


def stopped(row: dict[str, Any]) -> str:
    reason = " ".join(row["stopped"].split()).replace("|", "/")[:240]
    return f"| {row['fork']} | {row['versions']} | {row['what']} | {reason} |\n"


def main(paths: list[str]) -> None:
    rows = list(read(paths).values())
    page = HEAD
    for what, head, line in (("ask", ASK, asked_row), ("train", TRAIN, trained_row)):
        page += head + "".join(
            line(row) for row in rows if row["what"] == what and "stopped" not in row
        )
    if faults := [row for row in rows if "stopped" in row]:
        page += STOPPED + "".join(map(stopped, faults))
    sys.stdout.write(page)


if __name__ == "__main__":
    main(sys.argv[1:])
