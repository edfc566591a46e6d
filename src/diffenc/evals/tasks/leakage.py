"""The command `leakage`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffenc.errors import ConfigError
from diffenc.evals.task import Ask, AskOptions, Outcome, option
from diffenc.evals.tasks.captions import CaptionTask

if TYPE_CHECKING:
    from diffenc.evals.captioning import CaptionSet
    from diffenc.evals.folder_answerer import FolderAnswerer
    from diffenc.evals.inspection import Progress


@dataclass(frozen=True, kw_only=True)
class Leakage(CaptionTask):
    """Measure how much of a foreign prompt is said.

    The encoder reads captions of other pictures. The prompt readout is one number: 0 where it
    makes no difference which caption that is, 1 where every foreign word of it is said. It needs
    no metric.

    Attributes:
        guidance_scales: Guidance of the features, with commas or repeated, a row each; default as
            the model was trained.
    """

    name: ClassVar[str] = "leakage"
    prompt_policy: ClassVar[str | None] = None
    without: ClassVar[tuple[str, ...]] = ("prompts", "captions", "guidance_scale")

    guidance_scales: tuple[float, ...] | None = option(metavar="S,S", flag="--guidance-scale")

    @property
    def parts(self) -> tuple[str, ...]:
        """Two parts for each guidance scale."""
        rounds = [f"CFG={scale:g}, " for scale in self.guidance_scales or ()] or [""]
        kinds = ("foreign captions", "control")
        return tuple(f"{each}{kind}" for each in rounds for kind in kinds)

    def check(self) -> None:
        """Refuse scales that stand twice, and metrics that cannot run here."""
        super().check()
        scales = self.guidance_scales
        if scales == ():
            raise ConfigError(
                "guidance_scales holds no number; leave it out to ask the model as it was trained"
            )
        if scales is not None and len(set(scales)) < len(scales):
            raise ConfigError(f"guidance scales must stand once each, got {list(scales)}")

    def prepare(
        self,
        benchmark: "CaptionSet",
        model: "FolderAnswerer",
        prompts: Mapping[str, str],
        options: AskOptions,
    ) -> Ask:
        """Return the function that captions under foreign prompts, at each guidance scale."""
        from diffenc.evals.leakage import Setting, evaluate_leakage, leakage_table, sweep_leakage

        dropout = model.prompt_dropout
        settings = [
            Setting(guidance_scale=scale, prompt_dropout=dropout)
            for scale in self.guidance_scales or ()
        ]
        for setting in settings:
            model.guided(setting.guidance_scale)  # refused before anything is asked
        keywords: dict[str, Any] = {"seed": options.seed, **self.measuring, **options.asking}

        def ask(results: Path | None, progress: "Progress | None") -> Outcome:
            files: dict[str, Any] = {"results": results, "progress": progress}
            if settings:
                sweep = sweep_leakage(
                    benchmark,
                    lambda setting: model.guided(setting.guidance_scale),
                    settings,
                    **keywords,
                    **files,
                )
                evaluations, content = sweep.evaluations, sweep.to_dict()
                table = sweep.table(paper=options.paper)
            else:
                evaluation = evaluate_leakage(benchmark, model, **keywords, **files)
                evaluations, content = (evaluation,), evaluation.to_dict()
                table = leakage_table([(model.name, evaluation)], paper=options.paper)
            return Outcome(
                content=content,
                tables=[table],
                notes=tuple(dict.fromkeys(note for each in evaluations for note in each.notes)),
                count=sum(2 * len(each.items) for each in evaluations),
                fresh=sum(each.fresh for each in evaluations),
            )

        return ask
