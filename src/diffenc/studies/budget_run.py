"""One seed of the study of the budget: its scenes, their tokens, and the answers read from them."""

from collections.abc import Callable, Sequence
from statistics import mean

from torch import Tensor

from diffenc.clip.tokens import ClipTokens
from diffenc.encoder import DiffusionEncoder
from diffenc.studies.budget_arms import MOONSHOT, Arm, Choice, CrowdTokens, groups_of
from diffenc.studies.budget_choices import Choices, Place, shares_right
from diffenc.studies.crowd_readers import CrowdQuestions, read_answers
from diffenc.studies.crowd_trials import CROWD_PROPERTIES, CrowdProperty, CrowdTrial
from diffenc.studies.probes import held_in, with_seed
from diffenc.studies.token_readers import READERS, Reader

BASES = (Arm("cond", side=8), Arm("uncond", side=8))
"""What the few tokens of words are compared with: 64 cells, under the question and without text."""

FRACTIONS = (4, 2)
"""A fourth and a half of the scenes are fitted to as well: what many tokens lose where readers have
few scenes to learn from is no lack of theirs."""

_NO_CHOICE = Choice(())


class BudgetRun:
    """Run of one seed.

    Args:
        encoder: Encoder whose model, taps and timestep are studied.
        trials: Scenes with their questions, of which the first two thirds are fitted to.
        choices: Settings of each family for each reader.
        sides: Sides of the grids that are read.
        seed: Seed of the noise, of what is initialised and of the order of rows.
        epochs: Number of epochs of the readers.
        batch_size: Number of scenes per call of the U-Net.
        clip: CLIP whose grid is read too; None reads none.
        done: Function that is called after each call of the U-Net with its number of rows.

    Attributes:
        answers: Answers to the questions of the scenes that are not fitted to, by arm and reader.
    """

    def __init__(
        self,
        encoder: DiffusionEncoder,
        trials: Sequence[CrowdTrial],
        choices: Choices,
        *,
        sides: Sequence[int],
        seed: int,
        epochs: int,
        batch_size: int,
        clip: ClipTokens | None,
        done: Callable[[int], object],
    ) -> None:
        self.choices, self.seed, self.epochs = choices, seed, epochs
        self.questions = CrowdQuestions.of(trials)
        self.scenes_to_fit = held_in(len(trials))
        self.split = len(CROWD_PROPERTIES) * self.scenes_to_fit
        self.tested = trials[self.scenes_to_fit :]
        self.tokens = CrowdTokens(
            with_seed(encoder, seed),
            trials,
            sides=sides,
            batch_size=batch_size,
            clip=clip,
            done=done,
        )
        self.answers: dict[Place, Tensor] = {}

    def read(self, arm: Arm, reader: Reader) -> None:
        """Fit a reader to an arm, and keep its answers."""
        self.answers[arm, reader] = self._fitted(arm, reader, self.scenes_to_fit)

    def accuracies(self) -> dict[Place, dict[CrowdProperty, float]]:
        """Share of right answers by arm, reader and property."""
        return {place: self._shares(labels) for place, labels in self.answers.items()}

    def growth(self) -> dict[tuple[Arm, Reader, int], float]:
        """Mean accuracy of the arms that are compared, by the number of scenes fitted to."""
        shares = {}
        for reader in READERS:
            for arm in (MOONSHOT, *BASES):
                for fraction in FRACTIONS:
                    count = self.scenes_to_fit // fraction
                    labels = self._fitted(arm, reader, count)
                    shares[arm, reader, count] = mean(self._shares(labels).values())
                labels = self.answers[arm, reader]
                shares[arm, reader, self.scenes_to_fit] = mean(self._shares(labels).values())
        return shares

    def _shares(self, labels: Tensor) -> dict[CrowdProperty, float]:
        return shares_right(labels, self.questions, self.split)

    def _fitted(self, arm: Arm, reader: Reader, scenes: int) -> Tensor:
        tokens = self.tokens.rows(arm, self.choices.get((arm.family, reader), _NO_CHOICE))
        return read_answers(
            tokens,
            self.questions,
            reader,
            groups=groups_of(tokens),
            split=scenes * len(CROWD_PROPERTIES),
            start=self.split,
            epochs=self.epochs,
            seed=self.seed,
        )
