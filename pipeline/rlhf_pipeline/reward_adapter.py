"""The reward adapter and its scalar head: made, scored, saved and loaded."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_api.run import Lora
from rlhf_pipeline.adapters import save_adapter
from rlhf_pipeline.models import lora_config

Pair = tuple[list[int], list[int]]
"""Token ids of the chosen and of the rejected text."""


class ScoreHead(nn.Linear):
    """The scalar head, in float32 whatever the type of the base: bfloat16 has too few digits for close scores."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)  # the loss begins at log 2, not at the noise of random scores

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., width). Returns (..., 1), float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float())


def with_reward_adapter(model: Any, lora: Lora) -> Any:
    """`model`, a sequence classifier with one output, with a new reward adapter and a head of zeros: PEFT's model."""
    from peft import get_peft_model

    model.score = ScoreHead(model.score.in_features, model.device)
    # With task SEQ_CLS, PEFT trains the head too and saves it in checkpoints.
    return get_peft_model(model, lora_config(lora, model, top=True, task="SEQ_CLS"))


def keep_trunk_frozen(model: Any) -> None:
    """Undo what TRL does for checkpointing: embeddings that ask for gradients would make backward run to the bottom."""
    if hasattr(model.base_model.model, "_require_grads_hook"):
        model.base_model.model.disable_input_require_grads()


def score(model: Any, texts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """The score of each text, read at its last token. texts: token ids. Returns (texts,), float32, on the CPU."""
    training = model.training
    model.eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # equal lengths together: less padding
    scores = torch.empty(len(texts))
    size = max(1, 4096 // max(len(text) for text in texts))
    device = model.device
    dtype = model.get_input_embeddings().weight.dtype
    for start in range(0, len(order), size):
        index = order[start : start + size]
        width = max(len(texts[i]) for i in index)
        ids = torch.tensor([[*texts[i], *[pad] * (width - len(texts[i]))] for i in index], device=device)
        mask = torch.tensor([[1] * len(texts[i]) + [0] * (width - len(texts[i])) for i in index], device=device)
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            scores[index] = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1).float().cpu()
    model.train(training)
    return scores


def score_pairs(model: Any, pairs: Sequence[Pair], pad: int) -> Tensor:
    """Scores of pairs: (pairs, 2), chosen first."""
    return score(model, [text for pair in pairs for text in pair], pad).view(-1, 2)


def save_reward_adapter(model: Any, folder: Path) -> None:
    """Write adapter/ under the layer names of the causal model, and head.safetensors {weight (1, hidden)}.

    The two models name their layers alike, and the head, which only the classifier has, goes to its own file.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    head = tensors.pop(next(name for name in tensors if name.endswith("score.weight")))
    config = copy.copy(model.peft_config["default"])
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    save_adapter(model, config, tensors, folder / "adapter")
    save_file({"weight": head.float().cpu().contiguous()}, folder / "head.safetensors")


def load_reward_adapter(model: Any, lora: Lora, folder: Path) -> Any:
    """A sequence classifier with the adapter and head that `save_reward_adapter` wrote."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = with_reward_adapter(model, lora)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    head = load_file(folder / "head.safetensors")["weight"]
    set_peft_model_state_dict(adapted, tensors | {"base_model.model.score.weight": head})
    return adapted
