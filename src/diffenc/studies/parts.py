"""What each part between U-Net and language model adds to the answers that can be read."""

from dataclasses import replace
from statistics import mean

import torch

from diffenc.clip.tokens import ClipTokens
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError
from diffenc.models.base import Backbone
from diffenc.studies.parts_reader import Questions
from diffenc.studies.parts_results import ASKED, NormRow, Part, PartRow, PartStudy
from diffenc.studies.parts_run import Found, PartRun
from diffenc.studies.results import Spread
from diffenc.studies.settings import Done, Progress, chance_of, require_least
from diffenc.studies.trials import Property, sample_trials

_CLIP_PARTS: tuple[Part, ...] = ("clip", "clip+uncond", "clip+cond", "captioner")


def study_parts(
    model: "str | Backbone" = "shapes",
    *,
    clip: str | None = "shapes-clip",
    scenes: int = 360,
    seeds: int = 3,
    rank: int = 8,
    epochs: int = 1,
    reader_epochs: int = 30,
    grid: int = 8,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> PartStudy:
    """Read answers from the tokens of each part, on scenes that nothing was fitted to.

    Held-out scenes of the miniature world have two or three objects. To each there are three
    questions, after colour, shape and position of one object. Answers are read by `AnswerReader`,
    which is fitted anew to every part's tokens, once told the question and once not. LoRA and the
    captioner are trained on the scenes that the readers are fitted to, together with readers of
    their own, and then read by fresh ones like everything else. LoRA is trained a second time on
    the same questions in the same order, of which the U-Net is not told: what it gains there is no
    work of the text.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        clip: Name or folder of a CLIP model; None leaves out the parts that need one, as does
            "shapes-clip" in a version that does not bundle it.
        scenes: Number of scenes per seed, 30 or more; two thirds to fit, the rest to test.
        seeds: Number of repetitions, each with other scenes, noise and order.
        rank: Rank of LoRA, 1 or more.
        epochs: Number of epochs of LoRA over the questions; the captioner has three times as many
            over the scenes, which are as many passes of the U-Net.
        reader_epochs: Number of epochs of the readers, and of the projectors.
        grid: Side of the token grid, in tokens.
        batch_size: Number of rows per call of the U-Net.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called after each call of the U-Net with the number of rows that
            are done and the number of all rows; None reports nothing.

    Raises:
        ConfigError: A number is too small.
        BackboneError: A model is unknown, missing or broken.

    Example:
        >>> study = study_parts(scenes=60, seeds=1, clip=None)
        >>> study.gain("cond", "uncond", "told")
        Spread(values=(...,))
    """
    _check(scenes, seeds, rank, epochs, reader_epochs, grid, batch_size)
    encoder = (
        DiffusionEncoder(model)
        if isinstance(model, Backbone)
        else DiffusionEncoder.from_pretrained(model, device=device, dtype=dtype)
    )
    encoder.config = replace(encoder.config, grid=grid)
    missing = _missing(clip)
    if missing:
        clip = None
    split = 2 * scenes // 3
    passes = scenes * 4  # two halves
    passes += split * 3 * epochs + scenes * 3  # LoRA and its features
    passes += split * 3 * epochs + scenes  # the same with an empty prompt
    passes += 0 if clip is None else split * 3 * epochs + scenes
    done = Done(progress, seeds * passes)
    found: Found = {}
    norms: dict[tuple[tuple[float, ...], bool], list[float]] = {}
    chances, rms = [], []
    for seed in range(seeds):
        run = PartRun(
            encoder,
            sample_trials(scenes, seed=seed, least=2),
            seed=seed,
            reader_epochs=reader_epochs,
            batch_size=batch_size,
            done=done.add,
        )
        for part, tokens in run.frozen(clip):
            run.read(part, tokens, found)
        run.lora(rank, epochs, found, asks=True)
        run.lora(rank, epochs, found, asks=False)
        if clip is not None:
            run.captioner(clip, 3 * epochs, found)
        run.norms(norms)
        rms.append(run.rms())
        chances.append(_chances(run.questions, 3 * split))
        encoder.clear_cache()
    return PartStudy(
        model=encoder.backbone.name,
        clip=clip,
        taps=tuple(tap.name for tap in encoder.feature_info),
        rows=tuple(
            PartRow(
                part, reader, {name: Spread(tuple(each[name] for each in values)) for name in ASKED}
            )
            for (part, reader), values in found.items()
        ),
        norms=tuple(NormRow(*case, Spread(tuple(values))) for case, values in norms.items()),
        rms=tuple(mean(each) for each in zip(*rms, strict=True)),
        chance={name: mean(chance[name] for chance in chances) for name in ASKED},
        missing=missing,
        settings={
            "scenes": scenes,
            "seeds": seeds,
            "rank": rank,
            "epochs": epochs,
            "reader_epochs": reader_epochs,
            "grid": grid,
            "timestep": encoder.config.timestep,
            "dtype": str(encoder.dtype).removeprefix("torch."),
        },
    )


def _missing(clip: str | None) -> dict[Part, str]:
    if clip is None:
        return dict.fromkeys(_CLIP_PARTS, "no CLIP was asked for")
    try:
        ClipTokens.from_pretrained(clip)
    except BackboneError as error:
        if clip != "shapes-clip":
            raise
        return dict.fromkeys(_CLIP_PARTS, str(error))
    return {}


def _chances(questions: Questions, split: int) -> dict[Property, float]:
    tested = questions.labels[split:]
    return {name: chance_of(tested[k :: len(ASKED)].tolist()) for k, name in enumerate(ASKED)}


def _check(
    scenes: int, seeds: int, rank: int, epochs: int, reader_epochs: int, grid: int, batch_size: int
) -> None:
    require_least(
        {
            "scenes": (scenes, 30),
            "seeds": (seeds, 1),
            "rank": (rank, 1),
            "epochs": (epochs, 1),
            "reader_epochs": (reader_epochs, 1),
            "grid": (grid, 1),
            "batch_size": (batch_size, 1),
        }
    )
