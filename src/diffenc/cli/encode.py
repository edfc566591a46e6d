"""`diffenc encode`: features of image files, written as safetensors."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc._version import __version__
from diffenc.cli.fields import Changes, with_fields
from diffenc.cli.files import check_output
from diffenc.cli.options import (
    Debug,
    Device,
    Dtype,
    Force,
    Model,
    SkipBroken,
    Variant,
    quiet_libraries,
    to_device,
    to_dtype,
)
from diffenc.cli.pictures import PictureFiles
from diffenc.cli.progress import progress_bar
from diffenc.cli.tables import print_table, readable_bytes
from diffenc.config import EncoderConfig
from diffenc.errors import ConfigError, ImageError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from diffenc.encoder import DiffusionEncoder
    from diffenc.features import Features
    from diffenc.passes.word_tokens import WordTokens


def _encode(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Files of pictures.")],
    changes: dict[str, Any],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File that is written, a .safetensors file."
        ),
    ] = Path("features.safetensors"),
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text for all images, or repeated: one per image, in order; default none.",
        ),
    ] = None,
    model: Model = "shapes",
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Published method whose taps and options are taken: gdf, mustafar, dift, "
            "cleandift or hyperfeatures; options given beside it win.",
        ),
    ] = None,
    unet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of another U-Net, a .safetensors file."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder or file of another VAE.")
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Alias or folder with the configs of a single file."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Tokenizer of a single file, which holds none."),
    ] = None,
    maps: Annotated[
        bool, typer.Option("--maps/--no-maps", help="Write one feature map per tap.")
    ] = True,
    tokens: Annotated[
        bool,
        typer.Option("--tokens/--no-tokens", help='Write "tokens": all taps on one grid, in rows.'),
    ] = False,
    word_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help='Write "word_tokens", "word_places" and "word_mask": tokens that N words of each '
            "image's text gather, and where in the image the words are seen.",
        ),
    ] = None,
    registers: Annotated[
        bool,
        typer.Option(
            "--registers/--no-registers",
            help="Keep register cells (lone cells of huge norm), or put the mean of the cells "
            "around in their place.",
        ),
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images per pass.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "float32",
    skip_broken: SkipBroken = False,
    variant: Variant = None,
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Write features of images under a text to a file.

    One tensor per tap (images, channels, height, width) and, with --tokens, "tokens" (images,
    cells, channels); with --word-tokens, "word_tokens" (images, words, channels), "word_places"
    (images, words, 4), which are the row and column of each centre and the spread along both, and
    "word_mask". The metadata entry "diffenc" holds, as JSON, the names of the images and of those
    left out, the prompts, the words, the options and the version.
    """
    parts: dict[str, Any] = {
        "preset": preset,
        "unet": unet,
        "vae": vae,
        "architecture": architecture,
        "tokenizer": tokenizer,
        "variant": variant,
    }
    check_output(output, suffixes=(".safetensors",), force=force)
    if not (maps or tokens or word_tokens):
        raise ConfigError("nothing to write: --no-maps needs --tokens or --word-tokens")
    if word_tokens and not registers:
        raise ConfigError("--word-tokens gathers features as they are; leave --no-registers out")
    _check_inputs(images, prompts, changes, words=word_tokens is not None)
    files = PictureFiles(images, skip_broken)
    files.check()

    import torch

    from diffenc.encoder import DiffusionEncoder
    from diffenc.storage.tensors import write_tensors

    quiet_libraries()
    encoder = DiffusionEncoder.from_pretrained(
        model,
        device=to_device(device),
        dtype=to_dtype(dtype),
        **{name: value for name, value in parts.items() if value is not None},
        **changes,
    )
    tensors: dict[str, torch.Tensor] = {}
    truncated: list[int] = []
    words: list[tuple[str, ...]] = []
    done = 0
    for features, gathered in _passes(encoder, files, prompts, batch_size, word_tokens):
        truncated += features.truncated
        kept = features if registers else features.without_registers()
        words += () if gathered is None else gathered.words
        for name, rows in _to_write(kept, gathered, maps=maps, tokens=tokens).items():
            _fill(tensors, name, rows, done, len(images))
            count = len(rows)
        done += count
    if done < len(images):
        tensors = {name: whole[:done].clone() for name, whole in tensors.items()}
    metadata = {
        "version": __version__,
        "model": encoder.backbone.name,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "images": list(map(str, files.kept_paths)),
        "left_out": files.left_out,
        "prompts": _texts(prompts, files.kept) or [],
        "truncated": truncated,
        "conditioning": features.conditioning,
        "grid": list(features.grid),
        "taps": [asdict(tap) for tap in encoder.feature_info],
        "config": encoder.config.to_dict(),
        **({} if registers else {"registers": False}),
        **({} if word_tokens is None else {"words": words}),
    }
    # One entry: the order of several is random, and equal calls shall write equal files.
    described = {"diffenc": json.dumps(metadata)}
    write_tensors(output, tensors, metadata=described)
    _report(output, tensors, sum(count > 0 for count in truncated))
    files.report()


_CHANGES = Changes(
    EncoderConfig,
    (
        "taps",
        "timestep",
        "draws",
        "conditioning",
        "guidance_scale",
        "size",
        "resize",
        "long_prompts",
        "seed",
        "reuse",
    ),
    {
        "taps": "NAME,NAME",
        "timestep": "T,T",
        "draws": "N",
        "guidance_scale": "S",
        "size": "PIXELS|HxW",
    },
)
encode = with_fields(_encode, {"changes": _CHANGES})


def _check_inputs(
    images: "Sequence[Path]",
    prompts: "Sequence[str] | None",
    changes: "Mapping[str, Any]",
    *,
    words: bool,
) -> None:
    """Find what is wrong with the input before a model is loaded."""
    conditioning = changes.get("conditioning")
    if not prompts and conditioning not in (None, "uncond"):
        raise ConfigError(f"conditioning {conditioning!r} needs --prompt; got none")
    if "guidance_scale" in changes and conditioning != "cfg":
        raise ConfigError("--guidance-scale is read by --conditioning cfg alone; pass that too")
    if words and not prompts:
        raise ConfigError("--word-tokens are gathered by the words of --prompt; got none")
    from diffenc.inputs.prompts import match_batch
    from diffenc.inputs.words import words_of

    if prompts:
        texts = match_batch(prompts, len(images))
        for text in texts if words else ():
            words_of(text)


def _texts(prompts: "Sequence[str] | None", places: "Sequence[int]") -> list[str]:
    """Prompts of the images at these places: one for all, or one for each."""
    if not prompts or len(prompts) == 1:
        return list(prompts or ())
    return [prompts[place] for place in places]


def _passes(
    encoder: "DiffusionEncoder",
    files: PictureFiles,
    prompts: "Sequence[str] | None",
    batch_size: int,
    words: int | None,
) -> "Iterator[tuple[Features, WordTokens | None]]":
    """The features of each batch and what words gather, with a progress bar on a terminal.

    Raises:
        ImageError: A picture broke after it was checked and shall not be skipped, or all did.
    """
    places = files.kept
    with progress_bar("encoding", unit="images") as progress:
        for start in range(0, len(places), batch_size):
            pictures = _opened(files, places[start : start + batch_size])
            if pictures:
                texts = _texts(prompts, list(pictures)) or None
                if words is None or texts is None:
                    yield encoder.extract(list(pictures.values()), texts), None
                else:
                    gathered = encoder.word_tokens(list(pictures.values()), texts, count=words)
                    yield gathered.features, gathered
            if progress is not None and len(places) > batch_size:
                progress(min(start + batch_size, len(places)), len(places))
    files.require_some()


def _opened(files: PictureFiles, places: "Sequence[int]") -> "dict[int, Image]":
    """Pictures by their places, without those that broke since they were checked."""
    from diffenc.inputs.images import load_image

    pictures = {}
    for place in places:
        try:
            pictures[place] = load_image(files.paths[place])
        except ImageError as error:
            files.skip(place, error)
    return pictures


def _to_write(
    features: "Features", gathered: "WordTokens | None", *, maps: bool, tokens: bool
) -> "Mapping[str, Tensor]":
    tensors = dict(features) if maps else {}
    if tokens:
        tensors["tokens"] = features.tokens()
    if gathered is not None:
        tensors["word_tokens"] = gathered.tokens
        tensors |= {"word_places": gathered.places, "word_mask": gathered.mask}
    return tensors


def _fill(tensors: "dict[str, Tensor]", name: str, rows: "Tensor", start: int, count: int) -> None:
    """Put the rows of a batch into the tensor of all images, which the first batch creates."""
    import torch

    if name not in tensors:
        tensors[name] = torch.empty(count, *rows.shape[1:], dtype=rows.dtype, device="cpu")
    whole = tensors[name]
    if rows.shape[1:] != whole.shape[1:]:
        raise ShapeError(
            f"the images have different sizes: {name} is {tuple(whole.shape[1:])} for the first "
            f"and {tuple(rows.shape[1:])} from image {start} on; choose --resize squash, crop or "
            "pad, or encode them one by one"
        )
    whole[start : start + len(rows)] = rows.cpu()


def _report(output: Path, tensors: "Mapping[str, Any]", truncated: int) -> None:
    rows = [
        (name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    ]
    print_table("features", ("tensor", "shape", "dtype"), rows)
    if truncated:
        typer.echo(
            f"warning: {truncated} prompts are longer than the text encoder reads and were cut; "
            "--long-prompts chunk reads all of them",
            err=True,
        )
    typer.echo(f"wrote {output} ({readable_bytes(output.stat().st_size)})")
