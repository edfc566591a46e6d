"""`diffenc app`: a page in the browser."""

from typing import Annotated

import typer

from diffenc._optional import require
from diffenc.cli.options import Debug, Device, Dtype, Model, quiet_libraries, to_device, to_dtype
from diffenc.errors import ConfigError


def serve(
    model: Model = "shapes",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    _debug: Debug = False,
) -> None:
    """Serve a page: drop a picture, type a question, see what it does to the features.

    Features as colours without a text and under the question, their difference, where each word is
    seen, and how well several texts fit; model, tap and timestep by choice. Needs the extra app.
    """
    require("gradio", extra="app")
    quiet_libraries()
    from diffenc.app.answers import Desk
    from diffenc.app.page import build, launch

    desk = Desk(device=to_device(device), dtype=to_dtype(dtype))
    page = build(desk, model)
    desk.backbone(model)
    typer.echo(f"serving {model} at http://{host}:{port}; Ctrl-C ends it")
    try:
        launch(page, host=host, port=port, browser=browser)
    except OSError as error:
        raise ConfigError(f"cannot serve at {host}:{port}: {error}; name another --port") from error
