"""What an answer of the encoder costs with PixArt-Σ and SD 3.5-medium, at real size on 512 px.

    python benchmarks/diffusion_transformers.py --threads 2 --json transformers.json

Transformer and VAE have their published configs and seeded random weights, built in memory;
nothing is downloaded. Texts are states as their encoders would give them, drawn at random: T5 alone
has 4.8 billion parameters and stays away, and encoders of one narrow layer stand in its place.
`--quick` takes narrow twins of few blocks and ends in a minute: its times mean nothing.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from real_size import seeded_part
from speed.bench import DisagreementError
from speed.cases import OVERHEAD_GOAL
from speed.measuring import (
    CLOCKS,
    clock,
    fast_dtype,
    forget_peak,
    in_turn,
    matrix_rate,
    median,
    peak_memory,
    weight_bytes,
)
from speed.program import DTYPES, describe_machine, positive
from speed.running import AGREEMENT
from tokenizers import Tokenizer, processors
from tokenizers.models import Unigram
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5TokenizerFast

from diffenc import DiffusionEncoder
from diffenc.cli.options import quiet_libraries
from diffenc.config import EncoderConfig
from diffenc.denoiser.shortening import shortened
from diffenc.inputs.noise import shared_noise
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.models.base import Backbone
from diffenc.models.configs import known_architecture
from diffenc.models.memory_format import arrange, set_format
from diffenc.models.pixart import PixArt
from diffenc.models.schedules import make_scheduler
from diffenc.models.sd3 import StableDiffusion3
from diffenc.models.shapes import shapes_folder

ALIASES = ("pixart-sigma", "sd3.5-medium")
TIMESTEPS = {"pixart": 50, "sd3": 515}
SIZE, QUICK_SIZE = 512, 64
MEMORY_GOAL = 24e9
WORDS = 20
"""Own tokens of a text."""


_NARROW: dict[str, dict[str, Any]] = {
    "pixart": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "cross_attention_dim": 32,
        "caption_channels": 32,
    },
    "sd3": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "dual_attention_layers": [0, 1],
    },
}


def build_backbone(alias: str, dtype: torch.dtype, *, quick: bool) -> Backbone:
    """A model of real size with random weights, and with text encoders that stand in.

    Args:
        alias: One of `ALIASES`.
        dtype: The weights are drawn in it, so that no copy in float32 is needed.
        quick: Few narrow blocks and a narrow VAE.
    """
    known = known_architecture(alias)
    assert known is not None
    configs = {part: dict(config) for part, config in known.configs.items()}
    if quick:
        configs["transformer"] |= _NARROW[known.family]
        widths = configs["vae"]["block_out_channels"]
        configs["vae"]["block_out_channels"] = [width // 16 for width in widths]
        configs["vae"]["norm_num_groups"] = 4
    transformer, vae = (seeded_part(part, configs[part], dtype) for part in ("transformer", "vae"))
    common: dict[str, Any] = {
        "name": alias,
        "transformer": transformer,
        "vae": vae,
        "scheduler": make_scheduler(configs["scheduler"], flow=known.family == "sd3"),
    }
    model: Backbone
    if known.family == "pixart":
        words = _t5_tokenizer()
        width = configs["transformer"]["caption_channels"]
        t5 = {"d_model": width, "d_kv": 8, "d_ff": 8, "num_heads": 1, "num_layers": 1}
        encoder = seeded_part("text_encoder", {**t5, "vocab_size": len(words)}, dtype, "pixart")
        model = PixArt(text_encoder=encoder, tokenizer=words, **common)
    else:
        width = configs["transformer"]["pooled_projection_dim"] // 8
        clips = [_clip(part * width, dtype) for part in (3, 5)]  # 768 and 1280
        clip_words = _clip_tokenizer()
        model = StableDiffusion3(
            text_encoder=clips[0],
            tokenizer=clip_words,
            text_encoder_2=clips[1],
            tokenizer_2=copy.deepcopy(clip_words),
            **common,
        )
    return arrange(model)


def _clip(width: int, dtype: torch.dtype) -> Any:
    config = {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": len(_clip_tokenizer()),
    }
    return seeded_part("text_encoder", config, dtype, "sd3")


def _clip_tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(shapes_folder() / "tokenizer", model_max_length=77)


def _t5_tokenizer() -> Any:
    core = Tokenizer(Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], unk_id=2))
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=core, extra_ids=0, model_max_length=300)


@dataclass(frozen=True, slots=True)
class Question:
    """A picture and a text.

    Attributes:
        pixels: Picture (1 3 height width), uint8.
        embeds: States of the text, without padding where the model masks it.
    """

    pixels: Tensor
    embeds: PromptEmbeds


class Job:
    """A model, and the same question for every contender.

    Args:
        backbone: The model.
        size: Side of the pictures, in pixels.
        conditioning: "cfg" for both halves, or "cond" for the one under the text.
    """

    def __init__(
        self, backbone: Backbone, size: int, conditioning: Literal["cond", "cfg"] = "cfg"
    ) -> None:
        self.backbone, self.size = backbone, size
        self.timestep = TIMESTEPS[backbone.family]
        (self.tap,) = backbone.default_taps
        self.config = EncoderConfig(
            taps=(self.tap,), timestep=self.timestep, size=size, conditioning=conditioning
        )
        self.halves = 2 if conditioning == "cfg" else 1
        self.uncond = backbone.embed_uncond(None, size=(size, size))

    def ask(self, index: int, *, picture: int) -> Question:
        """Question number `index`: always another text.

        Args:
            index: From 0.
            picture: Number of the picture.
        """
        generator = torch.Generator().manual_seed(picture)
        shape = (1, 3, self.size, self.size)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        generator.manual_seed(1000 + index)
        config, dtype = self.backbone.denoiser.config, self.backbone.dtype
        draw = partial(torch.randn, generator=generator)
        if self.backbone.family == "pixart":
            states = draw(1, WORDS, config.caption_channels).to(dtype)
            return Question(pixels, PromptEmbeds(states, truncated=(0,)))
        states = draw(1, 77 + 256, config.joint_attention_dim).to(dtype)
        pooled = draw(1, config.pooled_projection_dim).to(dtype)
        return Question(pixels, PromptEmbeds(states, pooled, truncated=(0,)))

    def noised(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents at the job's noise level, by hand."""
        values = (pixels.float() / 127.5 - 1).to(vae.dtype)
        shift = vae.config.get("shift_factor") or 0.0
        mode = vae.encode(values).latent_dist.mode().float().contiguous()
        latents = (mode - shift) * vae.config.scaling_factor
        noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=self.timestep)
        if self.backbone.family == "pixart":
            kept = float(self.backbone.scheduler.alphas_cumprod[self.timestep])
            noisy = kept**0.5 * latents + (1 - kept) ** 0.5 * noise
        else:
            sigma = self.timestep / 1000
            noisy = (1 - sigma) * latents + sigma * noise
        rounded: Tensor = noisy.to(self.backbone.dtype)
        return rounded

    def arguments(
        self, noisy: Tensor, texts: Sequence[PromptEmbeds], *, states: int | None = None
    ) -> dict[str, Any]:
        """Arguments of the transformer, by hand.

        Args:
            noisy: Noisy latents, a row for each text.
            texts: Encoded texts of one row.
            states: Number of states that texts are padded to, as PixArt's pipeline pads them; None
                takes the longest text's.
        """
        steps = torch.full((len(noisy),), self.timestep, dtype=torch.long)
        rows = [text.prompt_embeds[0] for text in texts]
        if self.backbone.family == "sd3":
            pooled = [text.pooled_prompt_embeds for text in texts]
            return {
                "hidden_states": noisy,
                "encoder_hidden_states": torch.stack(rows),
                "pooled_projections": torch.cat([row for row in pooled if row is not None]),
                "timestep": steps,
            }
        longest = states or max(map(len, rows))
        mask = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
        padded = [nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows]
        return {
            "hidden_states": noisy,
            "encoder_hidden_states": torch.stack(padded),
            "encoder_attention_mask": mask.to(noisy.dtype),
            "timestep": steps,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }


class HookedScript:
    """Hooks on the plain model, as a user writes them: two passes of the whole transformer."""

    name = "plain diffusers"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.vae = copy.deepcopy(job.backbone.vae)
        set_format(self.vae, channels_last=False)  # diffusers' own

    @torch.no_grad()
    def answer(self, question: Question) -> Tensor:
        """Guided features at the tap."""
        job, kept = self.job, list[Any]()
        noisy = job.noised(self.vae, question.pixels)
        states = 300 if job.backbone.family == "pixart" else None
        module = job.backbone.denoiser.get_submodule(job.tap)
        handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output))
        try:
            for text in (job.uncond, question.embeds)[-job.halves :]:
                job.backbone.denoiser(**job.arguments(noisy, [text], states=states))
        finally:
            handle.remove()
        *uncond, cond = (_as_map(output) for output in kept)
        return uncond[0] + job.config.guidance_scale * (cond - uncond[0]) if uncond else cond


class Floor:
    """The bare modules: VAE, and a transformer that ends behind the tap, with nothing around."""

    name = "bare floor"

    def __init__(self, job: Job) -> None:
        self.job = job
        self.short: Any = shortened(job.backbone.denoiser, [job.tap])
        self.noisy = torch.empty(0)
        self.uncond = torch.empty(0)

    @torch.no_grad()
    def answer(self, question: Question) -> Tensor:
        """Both halves in one call."""
        self.noisy = self.job.noised(self.job.backbone.vae, question.pixels)
        texts = [self.job.uncond, question.embeds][-self.job.halves :]
        rows = self.noisy.expand(self.job.halves, -1, -1, -1)
        maps = self._pass(rows, texts)
        if self.job.halves == 1:
            return maps
        self.uncond = maps[:1]
        return torch.lerp(self.uncond, maps[1:], self.job.config.guidance_scale)

    @torch.no_grad()
    def answer_next(self, question: Question) -> Tensor:
        """The half under the text, of a picture that was answered about."""
        cond = self._pass(self.noisy, [question.embeds])
        if self.job.halves == 1:
            return cond
        return torch.lerp(self.uncond, cond, self.job.config.guidance_scale)

    def _pass(self, noisy: Tensor, texts: Sequence[PromptEmbeds]) -> Tensor:
        kept = list[Any]()
        module = self.short.get_submodule(self.job.tap)
        handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output))
        self.short(**self.job.arguments(noisy, texts))
        handle.remove()
        return _as_map(kept[0])


def _as_map(output: Any) -> Tensor:
    """The picture's tokens of a block of PixArt (b n c) or SD 3 (text, picture), as a map."""
    tokens: Tensor = output[1] if isinstance(output, tuple) else output
    side = round(tokens.shape[1] ** 0.5)
    return rearrange(tokens, "b (h w) c -> b c h w", h=side)


@dataclass(slots=True)
class Measured:
    """One contender on one kind of question.

    Attributes:
        model: Alias.
        question: "first" on a picture, or "next".
        contender: Name.
        seconds: Time of each call, in seconds.
        speedup: Times as fast as plain diffusers, which answers every question anew.
        overhead: Time over the floor's, as a share of it; of diffenc alone.
        difference: Largest difference from the features of diffenc, of their largest magnitude.
        peak_bytes: Most memory of the process during a call.
    """

    model: str
    question: str
    contender: str
    seconds: list[float]
    speedup: float | None = None
    overhead: float | None = None
    difference: float = 0.0
    peak_bytes: int | None = None


def measure(
    alias: str,
    job: Job,
    *,
    repeats: int,
    timer: Callable[[], float] = time.perf_counter,
) -> list[Measured]:
    """Agreement, times in turn, and peaks of one model.

    Plain diffusers, whose time is far from the others', is timed once.

    Args:
        alias: Name of the model.
        job: What is asked of it.
        repeats: Timed calls of diffenc and of the floor.
        timer: Clock; `time.process_time` leaves out what other programs take.

    Raises:
        DisagreementError: Contenders read different features.
    """
    backbone = job.backbone
    device = backbone.device
    encoder = DiffusionEncoder(backbone, job.config)
    script, floor = HookedScript(job), Floor(job)

    def ours(question: Question) -> Tensor:
        return encoder.extract(question.pixels, question.embeds)[job.tap]

    calls: dict[tuple[str, str], Callable[[Question], Tensor]] = {
        ("first", "diffenc"): ours,
        ("first", script.name): script.answer,
        ("first", floor.name): floor.answer,
        ("next", "diffenc"): ours,
        ("next", floor.name): floor.answer_next,
    }

    def prepare(kind: tuple[str, str], index: int) -> Callable[[], Tensor]:
        picture = 0 if kind[0] == "next" else 1 + index
        question = job.ask(index, picture=picture)
        if kind[0] == "next":  # whose picture is known, whoever was asked in between
            known = job.ask(10_000, picture=picture)
            if kind[1] == floor.name:
                floor.noisy, floor.uncond = of_floor
            elif not index:
                ours(known)
        return partial(calls[kind], question)

    floor.answer(job.ask(10_000, picture=0))
    of_floor = (floor.noisy, floor.uncond)
    rows, apart = dict[tuple[str, str], Measured](), dict[tuple[str, str], float]()
    expected, peaks = dict[str, Tensor](), dict[tuple[str, str], int | None]()
    seconds = dict[tuple[str, str], list[float]]()
    for kind in calls:  # warms all of them
        call = prepare(kind, 0)
        forget_peak(device)
        taken, features = clock(call, device, timer=timer)
        if kind[1] == script.name:
            seconds[kind] = [taken]
        features = features.float()
        peaks[kind] = peak_memory(device)
        first = expected.setdefault(kind[0], features)
        apart[kind] = float((features - first).abs().max() / first.abs().max())
        if not apart[kind] <= AGREEMENT[backbone.dtype]:
            raise DisagreementError(f"{alias}: {kind[1]} is {apart[kind]:.2g} from diffenc")
        facts = f"{taken:.2f} s before it was warm, {apart[kind]:.1g} apart, {peaks[kind]} bytes"
        print(f"{alias}, {kind[0]}, {kind[1]}: {facts}", file=sys.stderr, flush=True)
    # Apart, since a call that comes behind one of the other kind finds its weights in no cache.
    for question in ("first", "next"):
        timed = {kind: partial(prepare, kind) for kind in calls if kind[0] == question}
        timed.pop(("first", script.name), None)
        seconds |= in_turn(timed, device, repeats=repeats, first=1, timer=timer)
    for kind in calls:
        question, contender = kind
        row = Measured(alias, question, contender, seconds[kind], difference=apart[kind])
        row.peak_bytes = peaks[kind]
        if contender == "diffenc":
            row.speedup = seconds["first", script.name][0] / median(seconds[kind])
            row.overhead = _ratio(seconds[kind], seconds[question, floor.name]) - 1
        rows[kind] = row
    return list(rows.values())


def _ratio(over: list[float], under: list[float]) -> float:
    """Median over rounds: calls of one round meet the same load of the machine."""
    return median([a / b for a, b in zip(over, under, strict=True)])


def table(rows: Sequence[Measured]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | question | contender | time | speed-up | over floor | apart | peak memory |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        over = "" if row.overhead is None else f"{row.overhead:+.1%}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB"
        lines.append(
            f"| {row.model} | {row.question} | {row.contender} | {median(row.seconds):.2f} s | "
            f"{speedup} | {over} | {row.difference:.1g} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--models", nargs="+", choices=ALIASES, default=list(ALIASES), help="both by default")
    add("--dtype", choices=DTYPES, help="bfloat16 where it is fast")
    add("--repeats", type=positive, default=3, help="timed calls of each; 3 by default")
    add("--threads", type=positive, help="of torch")
    add("--conditioning", choices=["cfg", "cond"], default="cfg", help="both halves by default")
    add("--clock", choices=list(CLOCKS), default="wall",
        help="cpu leaves out what other programs take, and holds with one thread")  # fmt: skip
    add("--quick", action="store_true", help="narrow models and small pictures, in a minute")
    add("--json", type=Path, metavar="FILE", help="write the rows")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet_libraries()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    dtype = getattr(torch, options.dtype) if options.dtype else fast_dtype(device)
    machine = describe_machine(device, dtype, matrix_rate(device, dtype))
    rows = list[Measured]()
    for alias in options.models:
        print(f"building {alias} ...", file=sys.stderr, flush=True)
        backbone = build_backbone(alias, dtype, quick=options.quick)
        weights = weight_bytes(*backbone.parts().values())
        print(f"{alias}: {weights / 1e9:.2f} GB of weights", file=sys.stderr, flush=True)
        size = QUICK_SIZE if options.quick else SIZE
        try:
            job = Job(backbone, size, options.conditioning)
            timer = CLOCKS[options.clock]
            rows += measure(alias, job, repeats=options.repeats, timer=timer)
        except DisagreementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(table(rows[-5:]), flush=True)  # what is known if the next one fails
        if options.json:
            report = {"machine": machine, "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    ours = [row for row in rows if row.contender == "diffenc"]
    worst = max(row.overhead or 0.0 for row in ours)
    most = max(row.peak_bytes or 0 for row in ours)
    goals = [
        f"over the floor at most {worst:+.1%} (goal {OVERHEAD_GOAL:+.0%})",
        f"memory at most {most / 1e9:.1f} GB (goal {MEMORY_GOAL / 1e9:.0f} GB)",
    ]
    print(f"{machine['device']}, {machine['dtype']}, {machine['matrix_rate'] / 1e12:.3g} TFLOP/s")
    print("; ".join(goals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
