"""Names of taps in the literature: those of GDF, and the short ones of the paper.

GDF (Meng et al. 2024, arXiv:2410.03558) writes ``up-level1-repeat1-vit-block0-cross-q``; the later
version of the paper (arXiv:2507.07106, table 1) writes the same place ``U-L1-R1-B0-Cross-Q``.
"""

import re

_STAGES = {"u": "up", "d": "down", "m": "mid"}
_INITIALS = {"l": "level", "r": "repeat", "b": "vit-block"}
_SHORT = re.compile(r"([udm])((?:-[lrb]\d+)*)-([a-z]+(?:-[a-z]+)?)", re.IGNORECASE)
_OF_BLOCKS = {
    "": "out",
    "attn1.to_q": "self-q",
    "attn1.to_k": "self-k",
    "attn1.to_v": "self-v",
    "attn2.to_q": "cross-q",
    "ff.net.0": "ffn-inner",
}
_PATH = re.compile(
    r"(?:(?P<stage>up|down)_blocks\.(?P<level>\d+)|(?P<mid>mid)_block)\."
    r"(?:resnets\.(?P<resnet>\d+)(?P<branch>\.conv2)?"
    r"|attentions\.(?P<repeat>\d+)(?:\.transformer_blocks\.(?P<block>\d+)(?:\.(?P<inner>.+))?)?"
    r"|(?P<sampler>(?:up|down)sampler)s\.0)"
)


def gdf_name(path: str) -> str | None:
    """What GDF calls a module of a U-Net, or None where it has no name for it.

    Args:
        path: Module path, such as ``up_blocks.1.attentions.1``.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    stage = "mid" if match["mid"] else f"{match['stage']}-level{match['level']}"
    if match["sampler"]:
        return f"{stage}-{match['sampler']}-out"
    if match["resnet"]:
        return f"{stage}-repeat{match['resnet']}-res-{'increment' if match['branch'] else 'out'}"
    place = stage if match["mid"] else f"{stage}-repeat{match['repeat']}"
    if match["block"] is None:
        return f"{place}-vit-out"
    inner = _OF_BLOCKS.get(match["inner"] or "")
    return inner and f"{place}-vit-block{match['block']}-{inner}"


def spelled_out(name: str) -> str:
    """A name of the paper as GDF writes it, ``U-L1-R1-B0-Out``; any other name as it is."""
    match = _SHORT.fullmatch(name)
    if match is None:
        return name
    stage, places, what = match.groups()
    words = [_INITIALS[place[0]] + place[1:] for place in places.lower().split("-")[1:]]
    return "-".join([_STAGES[stage.lower()], *words, what.lower()])


def paper_name(path: str) -> str:
    """What the paper calls a module of a U-Net, ``U-L1-R1-B0-Cross-Q``; its path if nothing."""
    name = gdf_name(path)
    if name is None:
        return path
    for word, short in (("vit-block", "B"), ("level", "L"), ("repeat", "R"), ("vit-", "")):
        name = name.replace(word, short)
    stage, _, rest = name.partition("-")
    parts = [part if part[0].isupper() else part.capitalize() for part in rest.split("-")]
    return "-".join([stage[0].upper(), *parts])


def is_literature_name(name: str) -> bool:
    """Whether a tap is named in one of these ways, and not by its module path."""
    return re.match(r"(up|down)-(level|repeat)\d|mid-(repeat|vit)", spelled_out(name)) is not None
