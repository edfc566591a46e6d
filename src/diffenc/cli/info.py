"""`diffenc info`: what a model is made of and where it can be read, from its configs alone."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffenc.cli.options import Debug, quiet_libraries
from diffenc.cli.tables import print_table, readable_bytes
from diffenc.errors import BackboneError
from diffenc.storage.names import is_folder

if TYPE_CHECKING:
    from diffenc.models import BackboneSource, TapInfo

_MAIN_TAPS = re.compile(r"conv_in|(mid_block|\w+_blocks\.\d+)(\.attentions\.\d+)?")


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a model that holds weights.

    Attributes:
        name: Name of the part's folder.
        kind: Name of the part's class.
        parameters: Number of parameters.
        bytes_on_disk: Size of the part's weight files in bytes; 0 if they are not on this machine.
        memory: Bytes of the weights by the dtype that is asked for; what overflows in it stays in
            another.
    """

    name: str
    kind: str
    parameters: int
    bytes_on_disk: int
    memory: dict[str, int]


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Alias, Hub id, diffusers folder or .safetensors checkpoint; left out: list the "
            "aliases.",
        ),
    ] = None,
    every_tap: Annotated[
        bool, typer.Option("--all", "-a", help="List every tap, not the main ones alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    _debug: Debug = False,
) -> None:
    """Show a model's parts, memory and taps, or list the known models.

    No weights are loaded; the aliases need no network.
    """
    if model is None:
        _list_models(as_json)
        return
    quiet_libraries()
    description = describe(model)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    _print_description(description, every_tap)


def _list_models(as_json: bool) -> None:
    from diffenc.models import list_backbones

    sources = list_backbones()
    if as_json:
        typer.echo(
            json.dumps([{**asdict(s), "here": _here(s) is not None} for s in sources], indent=2)
        )
        return
    rows = [
        (s.alias, s.summary, ", ".join(s.hub_ids) or "bundled", "yes" if _here(s) else "no")
        for s in sources
    ]
    print_table("models", ("alias", "what it is", "from", "here"), rows)
    typer.echo("Any other diffusers folder or Hub id of these families works too.")


def _here(source: "BackboneSource") -> Path | None:
    """The folder of a model that needs no download."""
    from huggingface_hub import try_to_load_from_cache

    from diffenc.models.shapes import shapes_folder
    from diffenc.storage.weights import DIFFUSERS, weight_bytes

    if not source.hub_ids:
        bundled = shapes_folder(source.alias)
        return bundled if is_folder(bundled) else None
    for hub_id in source.hub_ids:
        index = try_to_load_from_cache(hub_id, "model_index.json")
        folder = Path(index).parent if isinstance(index, str) else None
        known = (folder / part for part in ("unet", "transformer")) if folder is not None else ()
        if any(weight_bytes(part, DIFFUSERS) for part in known):
            return folder
    return None


def describe(model: str) -> dict[str, Any]:
    """Everything that `info` shows, as plain values.

    Raises:
        BackboneError: The model is unknown, not to be had, incomplete or broken.
    """
    from diffenc.models import describe as read
    from diffenc.models import list_backbones, resolve_folder
    from diffenc.models.schedules import prediction_of
    from diffenc.models.sources import single_file
    from diffenc.models.taps import count_parameters

    architecture = read(model)
    aliases = {source.alias: source for source in list_backbones()}
    if model in aliases:
        folder = _here(aliases[model])
    else:
        folder = single_file(model) or resolve_folder(model, weights=False)
    parts = [
        _component(name, config, folder, architecture.family)
        for name, config in architecture.configs.items()
        if name != "scheduler"
    ]
    shortened = count_parameters(architecture.denoiser_config, architecture.default_taps)
    return {
        "model": model,
        "folder": None if folder is None else str(folder),
        "family": architecture.family,
        "default_size": architecture.default_size,
        "latent_reduction": architecture.reduction,
        "prediction_type": prediction_of(architecture.configs["scheduler"]),
        "components": [_component_values(part) for part in parts],
        "truncated_unet_parameters": shortened,
        "taps": [_tap_values(tap, architecture.default_taps) for tap in architecture.taps()],
    }


def _component(name: str, config: dict[str, Any], folder: Path | None, family: str) -> Component:
    """Count a part's parameters without memory for them."""
    import torch

    from diffenc.models.building import build_part
    from diffenc.models.stored import stem_of
    from diffenc.runtime.precision import stored_bytes
    from diffenc.storage.weights import weight_bytes

    try:
        with torch.device("meta"):
            module = build_part(name, config, family)
    except Exception as error:  # a broken config fails in any way
        raise BackboneError(f"cannot build {name} of {folder} from its config: {error}") from error
    return Component(
        name=name,
        kind=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        bytes_on_disk=0 if folder is None else weight_bytes(folder / name, stem_of(name)),
        memory={
            str(dtype).removeprefix("torch."): stored_bytes(module, config, dtype)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        },
    )


def _component_values(part: Component) -> dict[str, Any]:
    return {
        "name": part.name,
        "class": part.kind,
        "parameters": part.parameters,
        "memory_bytes": part.memory,
        "bytes_on_disk": part.bytes_on_disk,
    }


def _tap_values(tap: "TapInfo", default_taps: tuple[str, ...]) -> dict[str, Any]:
    return {**asdict(tap), "default": tap.name in default_taps}


def _print_description(facts: dict[str, Any], every_tap: bool) -> None:
    parts, size = facts["components"], facts["default_size"]
    rows = [
        (
            part["name"],
            part["class"],
            f"{part['parameters']:,}",
            *(readable_bytes(count) for count in part["memory_bytes"].values()),
            readable_bytes(part["bytes_on_disk"]) if part["bytes_on_disk"] else "not here",
        )
        for part in parts
    ]
    dtypes = tuple(parts[0]["memory_bytes"])
    totals = (
        readable_bytes(sum(part["memory_bytes"][dtype] for part in parts)) for dtype in dtypes
    )
    on_disk = sum(part["bytes_on_disk"] for part in parts)
    parameters = sum(part["parameters"] for part in parts)
    rows.append(("all", "", f"{parameters:,}", *totals, readable_bytes(on_disk) if on_disk else ""))
    numbers = ("parameters", *dtypes, "on disk")
    kept, whole = facts["truncated_unet_parameters"], parts[0]["parameters"]
    kind = "U-Net" if parts[0]["name"] == "unet" else parts[0]["name"]
    typer.echo(f"{facts['model']}, {facts['folder'] or 'to be downloaded when it is used'}")
    typer.echo(
        f"{facts['family']}, predicts {facts['prediction_type']}, {size} px by default, one latent "
        f"cell per {facts['latent_reduction']} px\n"
    )
    print_table("components", ("part", "class", *numbers), rows, right=numbers)
    typer.echo(
        f"truncate=True with the default taps: {kept:,} of {whole:,} {kind} parameters, "
        f"{readable_bytes(2 * (whole - kept))} less in half precision\n"
    )
    shown = [
        tap
        for tap in facts["taps"]
        if every_tap or tap["default"] or _MAIN_TAPS.fullmatch(tap["name"])
    ]
    tap_rows = [
        (
            tap["name"],
            tap["channels"],
            tap["reduction"],
            f"{size // tap['reduction']} x {size // tap['reduction']}",
            "yes" if tap["default"] else "",
        )
        for tap in shown
    ]
    columns = ("tap", "channels", "reduction", f"cells at {size} px", "default")
    print_table("taps", columns, tap_rows, right=columns[1:4])
    if len(shown) < len(facts["taps"]):
        typer.echo(f"{len(shown)} of {len(facts['taps'])} taps shown; --all lists the others.")
