"""`diffenc evaluate`: benchmarks of scores and of models that answer, and two studies."""

import typer

from diffenc.cli.evaluate_asked import add_asking
from diffenc.cli.evaluate_scored import add_scoring
from diffenc.evals.tasks import ASK_TASKS

evaluate = typer.Typer(help="Benchmarks of image-text matching, and of models that answer.")

add_scoring(evaluate)
for kind in ASK_TASKS:
    add_asking(evaluate, kind)
