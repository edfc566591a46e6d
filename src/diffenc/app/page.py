"""The page itself, made with Gradio."""

import warnings
from collections.abc import Sequence
from typing import Any

from PIL import Image

from diffenc._optional import require
from diffenc.app.answers import Desk, main_taps
from diffenc.errors import DiffencError
from diffenc.evals.tables import Table
from diffenc.models import list_backbones
from diffenc.shapes.example import example_picture

TITLE = "What a question does to a picture's features"
QUESTION = "where is the blue square?"
TEXTS = ("a blue square right of a red circle", "a yellow star", "a green triangle")
NAMES = ("Without a text", "Under the question", "What the question adds", "How far cells move")

_ABOUT = """\
A text-to-image model reads a picture twice in one call: without a text and under your question. \
Colours are principal components: in the first two pictures equal colours are equal features. \
Nothing is generated, and the picture stays on this machine."""


# Gradio has one number of columns for every screen: four tiles in a row are too small on a phone.
_STYLE = """\
.words .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(min(190px, 40%), 1fr)) !important;
}
.words .grid-wrap { max-height: none !important }
.words .caption-label { max-width: 100% }
"""


def build(desk: Desk, model: str = "shapes") -> Any:
    """The page, to be launched.

    Args:
        desk: Where models are loaded and asked.
        model: Model that the page begins with.

    Raises:
        MissingExtraError: Gradio is not installed.
        BackboneError: The model is unknown, missing or broken.
    """
    gr = require("gradio", extra="app")
    models = list(dict.fromkeys([model, *(source.alias for source in list_backbones())]))
    taps = main_taps(model)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{_ABOUT}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(example_picture(256), label="Picture", type="pil", height=300)
                question = gr.Textbox(QUESTION, label="Question")
                texts = gr.Textbox(
                    "\n".join(TEXTS), label="Texts to score, one a line", lines=3, max_lines=8
                )
                with gr.Accordion("Model, tap and timestep", open=False):
                    name = gr.Dropdown(models, value=model, label="Model", allow_custom_value=True)
                    tap = gr.Dropdown(taps, value=taps[0], label="Tap")
                    timestep = gr.Slider(0, 999, value=50, step=1, label="Timestep (noise)")
                button = gr.Button("Read the picture", variant="primary")
            with gr.Column(scale=5, min_width=300):
                with gr.Row():
                    maps = [
                        gr.Image(
                            label=label, interactive=False, min_width=200, height=240, buttons=[]
                        )
                        for label in NAMES
                    ]
                gr.Markdown("**Where each word of the question is seen**")
                words = gr.Gallery(
                    show_label=False, columns=4, height="auto", buttons=[], elem_classes="words"
                )
                with gr.Row():
                    chart = gr.Image(
                        show_label=False,
                        interactive=False,
                        min_width=240,
                        buttons=[],
                        elem_classes="chart",
                    )
                    with gr.Column(min_width=240):
                        table = gr.Markdown()

        def read(*inputs: Any) -> list[Any]:
            return _answered(gr, desk, *inputs)

        def choose(chosen: str) -> Any:
            try:
                names = main_taps(chosen)
            except DiffencError as error:
                raise gr.Error(str(error), print_exception=False) from error
            return gr.Dropdown(names, value=names[0])

        results = [*maps, words, chart, table]
        inputs = [picture, question, texts, name, tap, timestep]
        button.click(read, inputs, results, api_name="read")
        question.submit(read, inputs, results)
        page.load(read, inputs, results)
        name.change(choose, name, tap)
    return page


def _answered(
    gr: Any,
    desk: Desk,
    picture: Image.Image | None,
    question: str,
    texts: str,
    model: str,
    tap: str,
    timestep: float,
) -> list[Any]:
    """Values of the page's results; errors of the library become its messages."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            answer = desk.answer(
                picture,
                question or "",
                (texts or "").split("\n"),
                model=model,
                tap=tap,
                timestep=int(timestep),
            )
        except DiffencError as error:
            raise gr.Error(str(error), print_exception=False) from error
    for message in dict.fromkeys(str(each.message) for each in caught):
        gr.Warning(message)
    shown = [panel.image for panel in answer.features]
    words = [(image, word) for word, image in answer.words.items()]
    return [*shown, words, answer.chart, _table(answer.scores)]


def _table(scores: Sequence[tuple[str, float]]) -> str:
    best = scores[0][1]
    rows = tuple((text, f"{score:.5f}", f"{score - best:.5f}") for text, score in scores)
    return Table("Scores, higher is better", ("text", "score", "to the best"), rows).to_markdown()


def launch(page: Any, *, host: str, port: int, browser: bool, block: bool = True) -> str:
    """Serve the page until the program ends.

    Args:
        page: Page of `build`.
        host: Address to listen at; "127.0.0.1" is this machine alone.
        port: Port to listen at.
        browser: Whether to open the page in a browser.
        block: Whether to wait until the program is interrupted.

    Returns:
        Address of the page.
    """
    page.queue(default_concurrency_limit=1)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        css=_STYLE,
        prevent_thread_lock=True,
    )
    if block:
        page.block_thread()
    return str(address)
