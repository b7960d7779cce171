"""What scores a text: a trained adapter (scored by `Roles`), a classifier, or a function. `reward.json` says which."""

import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf_api.canonical import canonical_json
from rlhf_api.errors import UserError

REWARD_FILE = "reward.json"


@dataclass(frozen=True)
class RewardCard:
    """The contents of reward.json. A normalised score is (score - mean) / std."""

    type: Literal["adapter", "classifier", "function"]
    mean: float = 0.0
    std: float = 1.0
    label: str | None = None  # of a classifier
    function: str | None = None  # module:callable

    def save(self, folder: Path) -> None:
        """Write reward.json into `folder`."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        (folder / REWARD_FILE).write_bytes(canonical_json(fields))

    @classmethod
    def load(cls, folder: Path) -> "RewardCard":
        """Read reward.json of a reward-model artifact."""
        return cls(**json.loads((folder / REWARD_FILE).read_bytes()))


def load_reward(folder: Path, device: torch.device) -> "TextReward | None":
    """The classifier or function of a reward-model artifact; None for an adapter, which `Roles.add_reward` loads."""
    card = RewardCard.load(folder)
    if card.type == "function":
        assert card.function
        return FunctionReward(card.function)
    if card.type == "classifier":
        assert card.label
        return ClassifierReward(folder / "classifier", card.label, device)
    return None


@dataclass(frozen=True)
class FunctionReward:
    """A Python function as the reward. Raises UserError where the function cannot be imported or misbehaves."""

    reference: str  # module:callable
    field: str = "reward.function"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One finite number for each (prompt, response)."""
        return call_scorer(self.function(), list(prompts), list(responses), f"{self.field}: {self.reference}")

    def function(self) -> Callable[[list[str], list[str]], Any]:
        """The imported callable."""
        module_name, _, name = self.reference.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the module's own code raises
            raise UserError(
                f"{self.field}: {self.reference}: importing {module_name} failed with {type(error).__name__}: {error}; "
                "it must be importable in the stage's process (installed, or on PYTHONPATH)"
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            what = "is not there" if function is None else f"is a {type(function).__name__}, not callable"
            raise UserError(f"{self.field}: {self.reference}: {name} {what}; name a function of {module_name}")
        return function


def call_scorer(
    function: Callable[[list[str], list[str]], Any], prompts: list[str], responses: list[str], name: str
) -> list[float]:
    """Call a scorer of (prompts, responses) and check that it gives one finite number for each.

    Raises UserError that begins with `name` and says which sample was at fault.
    """
    try:
        scores = list(function(prompts, responses))
    except Exception as error:
        sample = _first_failing(function, prompts, responses)
        raise UserError(f"{name} raised {type(error).__name__}: {error}{sample}") from error
    if len(scores) != len(responses):
        raise UserError(f"{name} returned {len(scores)} numbers for {len(responses)} samples; return one for each")
    numbers = []
    for index, score in enumerate(scores):
        try:
            number = float(score)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} returned {score!r} for sample {index}; return a number") from error
        if not math.isfinite(number):
            raise UserError(
                f"{name} returned {number} for sample {index}, {responses[index]!r}; return a finite number"
            )
        numbers.append(number)
    return numbers


def _first_failing(function: Callable[..., Any], prompts: list[str], responses: list[str]) -> str:
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            list(function([prompt], [response]))
        except Exception:  # noqa: BLE001 the caller reports what it raised
            return f" (sample {index}: {response!r})"
    return ""


class ClassifierReward:
    """The logit of one class of a sequence-classification model, read on prompt and response as one text."""

    def __init__(self, folder: Path, label: str, device: torch.device) -> None:
        """Load a folder in Hugging Face format. Raises UserError for a label that the model does not have."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.index = label_index(self.model.config, label)
        if self.tokenizer.pad_token_id is None:
            raise UserError("reward.classifier: its tokenizer has no PAD token; texts of unequal length need one")
        if self.model.config.pad_token_id is None:  # a causal model's head looks for the last token that is not PAD
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # RoBERTa's positions begin after the padding index, so two of them are no use.
        self.length = min(self.tokenizer.model_max_length, (positions or 512) - 2)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The logit for each (prompt, response). A text too long for the model loses its end."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=self.length, return_tensors="pt"
            ).to(self.model.device)
            with torch.no_grad():
                scores += self.model(**batch).logits[:, self.index].float().tolist()
        return scores


def label_index(config: Any, label: str) -> int:
    """The output that `label` names. Raises UserError that lists the model's labels."""
    labels = {name: int(index) for index, name in config.id2label.items()}
    if label not in labels:
        raise UserError(f"reward.classifier.label: {label!r} is no label of the model; it has {', '.join(labels)}")
    return labels[label]


TextReward = FunctionReward | ClassifierReward
