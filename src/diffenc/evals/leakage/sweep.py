"""Leakage as a function of the guidance scale and of the share of prompts dropped in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.answerers import Answerer, FunctionAnswerer
from diffenc.evals.captioning.data import CaptionSet
from diffenc.evals.leakage.evaluate import LeakageEvaluation, evaluate_leakage, leakage_table
from diffenc.evals.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model to be measured.

    Attributes:
        guidance_scale: Guidance scale s of the features f_u + s (f_c - f_u).
        prompt_dropout: Share of prompts that were empty in training, 0 to 1.
        name: Name of a further difference between settings; "" if there is none.
    """

    guidance_scale: float = 1.0
    prompt_dropout: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_dropout <= 1:
            raise ConfigError(f"prompt_dropout is a share, 0 to 1, got {self.prompt_dropout}")

    @property
    def label(self) -> str:
        """``"CFG=1.5, 30 % of prompts dropped"``."""
        parts = [self.name] if self.name else []
        parts.append(f"CFG={self.guidance_scale:g}")
        if self.prompt_dropout:
            parts.append(f"{100 * self.prompt_dropout:g} % of prompts dropped")
        return ", ".join(parts)


@dataclass(frozen=True)
class LeakageSweep:
    """Leakage by setting.

    Attributes:
        settings: Settings in the order in which they were given.
        evaluations: Evaluation of each setting, in the same order.
    """

    settings: tuple[Setting, ...]
    evaluations: tuple[LeakageEvaluation, ...]

    def table(self, *, paper: bool | None = None) -> Table:
        """See `leakage_table`."""
        labels = [setting.label for setting in self.settings]
        return leakage_table(list(zip(labels, self.evaluations, strict=True)), paper=paper)

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON holds it."""
        pairs = zip(self.settings, self.evaluations, strict=True)
        return {
            "curve": self.curve(self.settings[0].prompt_dropout),
            "settings": [
                {"guidance_scale": setting.guidance_scale, **evaluation.to_dict()}
                for setting, evaluation in pairs
            ],
        }

    def curve(self, prompt_dropout: float = 0.0) -> list[tuple[float, float]]:
        """Guidance scale and prompt readout of settings with that dropout, by scale."""
        return sorted(
            (setting.guidance_scale, evaluation.readout.value)
            for setting, evaluation in zip(self.settings, self.evaluations, strict=True)
            if setting.prompt_dropout == prompt_dropout
        )


def sweep_leakage(
    data: CaptionSet,
    make: Callable[[Setting], Answerer],
    settings: Sequence[Setting],
    *,
    results: "Path | None" = None,
    **options: Any,
) -> LeakageSweep:
    """Measure one model after the other on the same images and prompts.

    Args:
        data: Images with reference captions.
        make: Function that returns the model of a setting; called when its turn comes, so that one
            model at a time is in memory.
        settings: Settings to measure, each once.
        results: JSON lines file that keeps the captions of all settings; None keeps nothing.
        options: Further keyword arguments of `evaluate_leakage`.

    Raises:
        ConfigError: No settings, or one stands twice; and what `evaluate_leakage` raises.
    """
    if not settings or len({setting.label for setting in settings}) < len(settings):
        raise ConfigError(
            f"settings must be one or more, each once, got {[s.label for s in settings]}"
        )
    evaluations = []
    for setting in settings:
        model = make(setting)
        named = FunctionAnswerer(f"{model.name}, {setting.label}", model.answer, model.description)
        evaluations.append(evaluate_leakage(data, named, results=results, **options))
        del model, named
    return LeakageSweep(tuple(settings), tuple(evaluations))
