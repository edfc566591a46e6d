"""`diffenc encode`: features of pictures, in one file or in a folder of shards."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from diffenc._typing import Tokens
from diffenc.cli.encode_outputs import encode_to_file, encode_to_folder
from diffenc.cli.fields import Changes, with_fields
from diffenc.cli.files import check_output
from diffenc.cli.options import (
    DISCARD_HELP,
    Debug,
    Device,
    Dtype,
    Force,
    Model,
    SkipBroken,
    Variant,
    quiet_libraries,
)
from diffenc.cli.parsing import parse_channels
from diffenc.config import EncoderConfig
from diffenc.errors import ConfigError
from diffenc.storage.names import exists, is_folder

_FILE = ".safetensors"


def _encode(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE",
            help="Files of pictures; or one folder, one list (.csv, .jsonl, .parquet, .txt) or one "
            ".tar archive of pictures.",
        ),
    ],
    changes: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            "-o",
            metavar="FILE|FOLDER",
            help="A .safetensors file, or a folder that gets shards and an index; default "
            "features.safetensors for files of pictures, and the folder features for the rest.",
        ),
    ] = None,
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
            "cleandift, hyperfeatures or ditf; options given beside it win.",
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
        typer.Option(
            "--tokens/--no-tokens",
            help='Write "tokens": all taps on one grid, in rows. A switch without a value; '
            "--word-tokens writes those of words.",
        ),
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
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="mean|max", help="Make one vector of the cells of each map and of the tokens."
        ),
    ] = None,
    output_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Floating point type of what is written; default --dtype."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images per pass.")] = 8,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of threads that decode images; default one per core, 8 at most.",
        ),
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of a list with a text per image; in an archive the ending of files beside "
            "the images, such as txt.",
        ),
    ] = None,
    image_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of a list with the paths of the images.")
    ] = "image",
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Column of a list with a name per row; default the path."
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of images per shard; default what fits 256 MiB, 1000 at most.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    skip_broken: SkipBroken = False,
    variant: Variant = None,
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Write features of images under a text to a file, or to a folder of shards.

    A file is for what fits in memory: one tensor per tap (images, channels, height, width) and,
    with --tokens, "tokens" (images, cells, channels); with --word-tokens, "word_tokens" (images,
    words, channels), "word_places" (images, words, 4), which are the row and column of each centre
    and the spread along both, and "word_mask". The metadata entry "diffenc" holds, as JSON, the
    names of the images and of those left out, the prompts, the words, the options and the version.

    A folder is for any number: shards with the same tensors, and index.parquet, which says where
    each image's row is. After an interruption the same command goes on where it stopped.
    diffenc.open_features reads it.
    """
    if tokens and (kinds := [str(image) for image in images if _is_kind_of_tokens(image)]):
        raise ConfigError(
            f"--tokens takes no value, and {kinds[0]!r} is no picture here: it is a switch that "
            "writes the tokens of the grid. For tokens of words pass --word-tokens N, such as 8; "
            "alone or beside --tokens"
        )
    target = output or Path("features" if _is_collection(images) else f"features{_FILE}")
    in_folder = not target.suffix or is_folder(target)
    if not in_folder:
        check_output(target, suffixes=(_FILE,), force=force)
    _check_options(prompts, prompt_column, changes, word_tokens, maps or tokens)
    if word_tokens and not registers:
        raise ConfigError("--word-tokens gathers features as they are; leave --no-registers out")
    if shard_size and not in_folder:
        raise ConfigError("--shard-size is for a folder of shards: leave .safetensors out of -o")

    from diffenc.extraction.extractor import Extractor
    from diffenc.extraction.listing import list_pictures
    from diffenc.extraction.plan import check_folder
    from diffenc.inputs.prompts import match_batch
    from diffenc.inputs.words import words_of

    if in_folder:
        check_folder(target, overwrite=force)
    listing = list_pictures(
        images[0] if _is_collection(images) else images,
        prompt_column=prompt_column,
        image_column=image_column,
        id_column=id_column,
    )
    if prompts:
        texts: Sequence[str] = match_batch(prompts, len(listing))
        if len(texts) > 1:
            listing = replace(listing, prompts=texts)
    else:
        texts = listing.prompts or []
    for text in texts if word_tokens else ():
        words_of(text)
    quiet_libraries()
    # What the command line gives as text is checked by the object itself.
    words: dict[str, Any] = {"pool": pool, "output_dtype": output_dtype}
    extractor = Extractor(
        model,
        prompt=None if listing.prompts is not None or not prompts else prompts[0],
        prompt_column="prompt" if listing.prompts is not None else None,
        maps=maps,
        tokens=tokens,
        word_tokens=word_tokens,
        registers=registers,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        threads=threads,
        skip_broken=skip_broken,
        preset=preset,
        unet=unet,
        vae=vae,
        architecture=architecture,
        tokenizer=tokenizer,
        variant=variant,
        **words,
        **changes,
    )
    if in_folder:
        encode_to_folder(listing, extractor, target, shard_size=shard_size, force=force)
    else:
        paths = None if _is_collection(images) else images
        encode_to_file(listing, extractor, target, paths=paths)


def _is_kind_of_tokens(image: Path) -> bool:
    """Whether a picture that is not there is called like a kind of `EncoderConfig.tokens`."""
    return str(image) in get_args(Tokens) and not exists(image)


def _is_collection(sources: Sequence[Path]) -> bool:
    """Whether a folder, a list or an archive is named.

    Raises:
        ConfigError: There is more beside it.
    """
    from diffenc.extraction.listing import is_collection

    collections = [source for source in sources if is_collection(source)]
    if collections and len(sources) > 1:
        raise ConfigError(
            f"{collections[0]} is a folder, a list or an archive, which is given alone; or give "
            "files of pictures"
        )
    return bool(collections)


def _check_options(
    prompts: Sequence[str] | None,
    prompt_column: str | None,
    changes: Mapping[str, Any],
    word_tokens: int | None,
    others: bool,
) -> None:
    """Find what is wrong with the options before anything is read."""
    if not (others or word_tokens):
        raise ConfigError("nothing to write: --no-maps needs --tokens or --word-tokens")
    if prompts and prompt_column is not None:
        raise ConfigError("--prompt and --prompt-column both give texts: pass one of them")
    prompted = bool(prompts) or prompt_column is not None
    conditioning = changes.get("conditioning")
    if not prompted and conditioning not in (None, "uncond"):
        raise ConfigError(f"conditioning {conditioning!r} needs --prompt; got none")
    if "guidance_scale" in changes and conditioning != "cfg":
        raise ConfigError("--guidance-scale is read by --conditioning cfg alone; pass that too")
    if word_tokens and not prompted:
        raise ConfigError("--word-tokens are gathered by the words of --prompt; got none")


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
        "discard",
    ),
    {
        "taps": "NAME,NAME",
        "timestep": "T,T",
        "draws": "N",
        "guidance_scale": "S",
        "size": "PIXELS|HxW",
        "discard": "N,N|none",
    },
    readers={"discard": parse_channels},
    helps={"discard": DISCARD_HELP},
)
encode = with_fields(_encode, {"changes": _CHANGES})
