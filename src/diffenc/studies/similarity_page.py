"""The study of similarity as a page, as tables, as findings and as a picture."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from diffenc.evals.tables import Table
from diffenc.studies.charts import Panel, Series, draw_panels
from diffenc.studies.pages import page, paragraph, section
from diffenc.studies.similarity import (
    CKA,
    CLIP,
    IMAGE,
    OWN_NOISE,
    PAIR,
    STRANGERS,
    SimilarityStudy,
)
from diffenc.studies.spreads import Spread, written
from diffenc.studies.vlm.findings import RULE, DecidedFinding, Finding, decide, parse_claim
from diffenc.studies.vlm.page import finding_blocks

_SPEC = ".3f"

PAPER_CKA = {
    "D-L2-R0-B0-Cross-Q": (1.0, 0.99, 0.89, 0.54),
    "U-L1-R1-B0-Cross-Q": (0.99, 0.98, 0.82, 0.53),
    "U-L1-R1-B0-Out": (0.98, 0.95, 0.71, 0.51),
    "U-L1-R2-B0-Cross-Q": (1.0, 0.99, 0.85, 0.62),
    "U-L2-R1-B0-Cross-Q": (1.01, 0.99, 0.96, 0.89),
    "U-L2-R2-Res-Out": (0.94, 0.86, 0.40, 0.14),
}
"""CKA at s = 1, 1.5, 4 and 7, digitised from the paper's plot, ± 0.01."""

PAPER_COSINES = {
    "D-L2-R0-B0-Cross-Q": (0.715, 0.70, 0.69, 0.67, 0.64),
    "U-L1-R1-B0-Cross-Q": (0.69, 0.67, 0.66, 0.64, 0.63),
    "U-L1-R1-B0-Out": (0.20, 0.15, 0.135, 0.125, 0.135),
    "U-L1-R2-B0-Cross-Q": (0.765, 0.74, 0.73, 0.715, 0.69),
    "U-L2-R1-B0-Cross-Q": (0.695, 0.67, 0.66, 0.635, 0.615),
    "U-L2-R2-Res-Out": (0.26, 0.25, 0.24, 0.235, 0.195),
}
"""Mean cosine of MMVP-VLM's pairs at t = 10, 50, 100, 250 and 500, digitised, ± 0.01."""

_ABOUT_CKA = """\
CKA (linear, by the unbiased estimator) says how alike two sets of features order the same \
pictures: 1 is the same up to turning and scaling, 0 is nothing in common. It is between the \
features without a text and those guided by each picture's own caption, f_u + s (f_c - f_u). The \
estimator never exceeds 1; the paper's plot has a point at 1.01, which is within what reading a \
plot gives."""
_ABOUT_COSINES = """\
Cosine between the features of two pictures without a text. A pair differs in one thing; strangers \
are a picture and one of the next pair. One noise: both pictures are read under the same noise, as \
an encoder does; own noise: each under its own. No mean is taken off, so that what all pictures \
have in common counts as likeness: a tap tells pictures apart by the distance of pairs from \
strangers, not by the height of its cosines."""
_ABOUT_PAPER = """\
Digitised from the plots of the paper's later version (arXiv:2507.07106), ± 0.01: SD 2.1 at 512 \
pixels, MMVP-VLM. Neither its pooling nor its noise is stated. Photographs there, coloured shapes \
here: signs of differences compare, numbers do not."""


def findings_of(study: SimilarityStudy) -> list[DecidedFinding]:
    """The paper's findings that this run can decide."""

    def figure(key: tuple[str, str, str]) -> Spread | None:
        return study.find(*key)

    findings = list(_findings(study))
    if study.model != "shapes":  # the reasons are those of the miniature
        findings = [replace(each, if_not="") for each in findings]
    return [decide(finding, figure) for finding in findings]


def to_markdown(study: SimilarityStudy, *, command: str, made_with: str, picture: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
        picture: File name of the chart.
    """
    settings = study.settings
    decided = findings_of(study)
    vectors = {"flat": "all cells of a map in a row", "mean": "the mean over the cells of a map"}
    return page(
        "# How guidance changes features, and how alike near-same pictures are",
        f"`{command}`",
        paragraph(
            f"Model `{study.model}` at {settings['size']} px in {settings['dtype']}, pairs of "
            f"`{study.data}`: {settings['pairs']} per seed; {settings['seeds']} seeds of noise"
            f"{' and scenes' if study.data == 'shapes' else ''}, given as mean ± sample standard "
            f"deviation. A picture's vector is {vectors[settings['pool']]}. {made_with}"
        ),
        f"![CKA over the guidance scale, and cosines of pairs over the timestep]({picture})",
        "## What holds here",
        section("findings", finding_table(decided)),
        paragraph(RULE),
        *(block for each in decided for block in finding_blocks(each, _SPEC)),
        "## Guided and unguided features",
        paragraph(_ABOUT_CKA),
        cka_table(study).to_markdown(),
        "## Near-same pictures",
        paragraph(_ABOUT_COSINES),
        *(cosine_table(study, measure).to_markdown() for measure in (PAIR, OWN_NOISE, STRANGERS)),
        "## In the paper",
        paragraph(_ABOUT_PAPER),
        *(table.to_markdown() for table in paper_tables()),
        "## Taps",
        tap_table(study).to_markdown(),
    )


def finding_table(decided: Sequence[DecidedFinding]) -> Table:
    """Each finding with its verdict."""
    rows = tuple((each.finding.statement, each.verdict) for each in decided)
    return Table("Findings of the paper", ("finding", "here"), rows)


def cka_table(study: SimilarityStudy) -> Table:
    """CKA per tap and guidance scale."""
    columns = ("tap", *(f"s = {scale:g}" for scale in study.guidance_scales))
    rows = tuple(
        (tap, *(written(study.find(tap, CKA, s), _SPEC) for s in study.guidance_scales))
        for tap in study.taps
    )
    title = f"CKA of unconditional and guided features, t = {study.cka_timestep}"
    return Table(title, columns, rows)


def cosine_table(study: SimilarityStudy, measure: str) -> Table:
    """Mean cosine per tap and timestep, and CLIP's."""
    titles = {
        PAIR: "mean cosine of pairs, one noise",
        OWN_NOISE: "mean cosine of pairs, each picture under its own noise",
        STRANGERS: "mean cosine of strangers, one noise",
    }
    rows = [
        (tap, *(written(study.find(tap, measure, t), _SPEC) for t in study.timesteps))
        for tap in study.taps
    ]
    for name in CLIP:
        if value := study.find(name, measure, IMAGE):
            rows.append((f"{name} of {study.clip}", *[f"{value:{_SPEC}}"] * len(study.timesteps)))
    return Table(titles[measure], ("tap", *(f"t = {t}" for t in study.timesteps)), tuple(rows))


def paper_tables() -> list[Table]:
    """The paper's figures."""
    tables = []
    for title, columns, values in (
        ("CKA in the paper", ("s = 1", "s = 1.5", "s = 4", "s = 7"), PAPER_CKA),
        (
            "mean cosine of pairs in the paper",
            ("t = 10", "t = 50", "t = 100", "t = 250", "t = 500"),
            PAPER_COSINES,
        ),
    ):
        rows = tuple((tap, *(f"{value:g}" for value in row)) for tap, row in values.items())
        tables.append(Table(title, ("tap", *columns), rows))
    return tables


def tap_table(study: SimilarityStudy) -> Table:
    """The paper's name and the module path of each tap."""
    return Table("Taps", ("tap", "module"), tuple((n, f"`{p}`") for n, p in study.taps.items()))


def draw_similarity(study: SimilarityStudy, path: Path) -> None:
    """Draw CKA over the guidance scale and the cosines over the timestep.

    Args:
        study: Results of the study.
        path: Path of the picture file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    scales = [f"{scale:g}" for scale in study.guidance_scales]
    steps = [str(step) for step in study.timesteps]
    panels = [
        Panel(
            "CKA of guided with unconditional features",
            "CKA",
            list(_series(study, CKA, scales)),
            names=scales,
            axis="guidance scale s",
            joined=True,
        )
    ]
    for measure, title in (
        (PAIR, "near-same pictures, one noise"),
        (OWN_NOISE, "near-same pictures, own noise"),
        (STRANGERS, "strangers, one noise"),
    ):
        series = [*_series(study, measure, steps), *_clip_series(study, measure, steps)]
        panels.append(Panel(title, "mean cosine", series, names=steps, axis="t", joined=True))
    draw_panels(panels, path, title=f"How like each other features of {study.model} are", across=2)


def _series(study: SimilarityStudy, measure: str, at: Sequence[str]) -> Iterator[Series]:
    for tap in study.taps:
        points = [
            (k, value) for k, each in enumerate(at) if (value := study.find(tap, measure, each))
        ]
        if points:
            yield Series(tap, *zip(*points, strict=True))


def _clip_series(study: SimilarityStudy, measure: str, at: Sequence[str]) -> Iterator[Series]:
    for name in CLIP:
        value = study.find(name, PAIR if measure == OWN_NOISE else measure, IMAGE)
        if value is not None:
            yield Series(name, range(len(at)), [value] * len(at))


def _findings(study: SimilarityStudy) -> Iterator[Finding]:
    taps = list(study.taps)
    scales = [f"{scale:g}" for scale in study.guidance_scales]
    first, last = str(study.timesteps[0]), str(study.timesteps[-1])
    cross = [tap for tap in taps if tap.endswith("Cross-Q")]
    outs = [tap for tap in taps if tap.endswith("-Out")]
    if len(scales) > 1:
        yield _finding(
            "The stronger the guidance, the less guided features resemble unconditional ones.",
            "CKA falls from s = 1 to s = 7 at each of six taps.",
            [f"{t}/{CKA}/{a} > {t}/{CKA}/{b}" for t in taps for a, b in pairwise(scales)],
        )
    for out in outs:
        if "Res-Out" in out and len(taps) > 1:
            yield _finding(
                f"Of all taps {out} is moved furthest.",
                "At s = 7 U-L2-R2-Res-Out has a CKA of 0.14, all others 0.51 or more.",
                [f"{t}/{CKA}/{scales[-1]} > {out}/{CKA}/{scales[-1]}" for t in taps if t != out],
                "The miniature has two repeats at a level where SD has three, and one level less: "
                "its last residual output at that level lies right before the picture.",
            )
    if first != last:
        yield _finding(
            "The noisier, the less alike near-same pictures are (own noise).",
            "The mean cosine falls from t = 10 to t = 500 at each of six taps.",
            [f"{t}/{OWN_NOISE}/{first} > {t}/{OWN_NOISE}/{last}" for t in taps],
        )
        yield _finding(
            "The same under one noise.",
            "As above: whether a pair shares its noise is not stated.",
            [f"{t}/{PAIR}/{first} > {t}/{PAIR}/{last}" for t in taps],
            "Noise that two pictures share makes them more alike, the more of it there is.",
        )
    if cross and outs:
        yield _finding(
            "Near-same pictures are less alike in out and res-out taps than in cross-q taps.",
            "At t = 10 to 500 cosines are 0.13 to 0.26 there, and 0.62 to 0.77 in cross-q.",
            [f"{q}/{PAIR}/{first} > {out}/{PAIR}/{first}" for q in cross for out in outs],
            "How deep a tap lies decides as much as its kind: compare taps of one block. The plain "
            "backgrounds of the miniature make its last residual outputs alike.",
        )
    if study.clip is not None:
        yield _finding(
            "Diffusion features tell near-same pictures apart better than CLIP's embedding.",
            "Said on the project page; MMVP's pairs have a cosine above 0.95 in CLIP.",
            [f"{CLIP[0]}/{PAIR}/{IMAGE} > {t}/{PAIR}/{first}" for t in taps],
            "The miniature CLIP was trained on these very shapes, on which the pairs differ; and "
            "queries of cross-attention have a large part that all pictures share.",
        )


def _finding(statement: str, paper: str, claims: Sequence[str], if_not: str = "") -> Finding:
    return Finding(statement, paper, tuple(map(parse_claim, claims)), if_not)
