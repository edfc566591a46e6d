"""A prompt for each sample of LLaVA's training data, and its tensors in each batch."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from diffenc.errors import ConfigError
from diffenc.hosts.llava.prompting import IDS, MASK
from diffenc.hosts.prompts import PromptTokenizer
from diffenc.inputs.policies import PromptPolicy, PromptSample, captions_of, parse_policy

_KEY = "vision_prompt"


class PromptDataset(Dataset[dict[str, Any]]):
    """LLaVA's dataset, each sample with a prompt; all else, such as lengths, is the dataset's.

    Args:
        dataset: Dataset that has `list_data_dict`, the entries of LLaVA's JSON.
        policy: Policy that makes the prompts, see `diffenc.inputs.policies.parse_policy`.
        seed: Seed of what the policy draws.

    Raises:
        ConfigError: The dataset has no such list, or the policy does not parse.
    """

    def __init__(
        self, dataset: Any, policy: str | PromptPolicy = "question", seed: int = 0
    ) -> None:
        if not hasattr(dataset, "list_data_dict"):
            raise ConfigError(
                f"{type(dataset).__name__} has no list_data_dict, from which prompts are drawn; "
                f"add the key {_KEY!r} with a text to its samples yourself"
            )
        self.dataset, self.seed, self.epoch = dataset, seed, 0
        self.policy = parse_policy(policy) if isinstance(policy, str) else policy

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self.dataset[index]
        return {**item, _KEY: self.prompt(index)}

    def prompt(self, index: int) -> str:
        """Prompt of one sample in this epoch; "" for a sample without an image.

        Raises:
            PromptError: The sample lacks what the policy draws on.
        """
        entry = self.dataset.list_data_dict[index]
        if "image" not in entry and "video" not in entry:
            return ""
        sample = PromptSample(
            str(entry.get("id", index)),
            conversation=entry.get("conversations", ()),
            captions=captions_of(entry),
        )
        return self.policy(sample, seed=self.seed, epoch=self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew; accelerate's data loader calls it."""
        self.epoch = epoch

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class PromptCollator:
    """LLaVA's collator, with the prompts of a batch as tensors.

    Args:
        collator: Collator of the host.
        tokenizer: Tokenizer of the prompts: `tower.tokenizer`.
    """

    def __init__(self, collator: Any, tokenizer: PromptTokenizer) -> None:
        self.collator, self.tokenizer = collator, tokenizer

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: the host's, with `vision_prompt_ids` and `vision_prompt_mask`."""
        prompts = [instance.get(_KEY, "") for instance in instances]
        plain = [{k: v for k, v in instance.items() if k != _KEY} for instance in instances]
        batch: dict[str, Any] = self.collator(plain)
        tokens = self.tokenizer(prompts)
        for row, instance in enumerate(instances):
            if _KEY not in instance:  # no prompt, which "" is not
                tokens.mask[row] = 0
        return {**batch, IDS: tokens.ids, MASK: tokens.mask}
