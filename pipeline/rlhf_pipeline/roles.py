"""Four roles on one base: policy, critic and reward are adapters, the reference is the base with none.

With `lora.layers: top:k` the adapters sit on the top k layers, so below them all roles compute the same: the trunk. It
is computed once for a batch (`Roles.trunk`) and every role continues from it (`Roles.hidden`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_api.errors import UserError
from rlhf_api.run import Lora
from rlhf_pipeline.adapters import save_adapter
from rlhf_pipeline.models import adapted_layers, lora_config, vocabulary_logits
from rlhf_pipeline.passes.low_rank import lean_layers
from rlhf_pipeline.stack import stack_of

Role = Literal["policy", "critic", "reward", "reference"]
ADAPTERS: tuple[Role, ...] = ("policy", "critic", "reward")


def positions_of(mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row; padding gets 0. mask and result: (batch, sequence)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Trunk:
    """A batch of sequences and what the layers below the adapters make of it."""

    ids: Tensor  # (batch, sequence)
    mask: Tensor  # (batch, sequence), true where a token is real
    hidden: Tensor | None  # (batch, sequence, width); None where the adapters reach down to the first layer

    def rows(self, index: Tensor | slice) -> "Trunk":
        """The same for some of the sequences."""
        return Trunk(self.ids[index], self.mask[index], None if self.hidden is None else self.hidden[index])

    def trimmed(self, last: int) -> "Trunk":
        """The same without the `last` columns, nor the first ones that are padding in every sequence."""
        columns = slice(int(self.mask.any(0).int().argmax()), self.ids.shape[1] - last)
        hidden = None if self.hidden is None else self.hidden[:, columns]
        return Trunk(self.ids[:, columns], self.mask[:, columns], hidden)


class Bypass(nn.Module):
    """Stands in for a decoder layer: hands its input on, or `inject` if given, and remembers it."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.inject: Tensor | None = None
        self.seen: Tensor | None = None
        if hasattr(layer, "attention_type"):  # some decoders choose the mask by it
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        self.seen = hidden_states = hidden_states if self.inject is None else self.inject
        return (hidden_states,) if self.returns_tuple else hidden_states


class Checkpointed(nn.Module):
    """A decoder layer whose activations are computed again in the backward pass instead of kept."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, *arguments: Any, **named: Any) -> Any:
        # Nothing random runs inside, since every dropout is off: no generator state to keep.
        return checkpoint(self.layer, *arguments, use_reentrant=False, preserve_rng_state=False, **named)


class Roles:
    """One base model with its adapters and scalar heads."""

    def __init__(
        self, model: Any, lora: Lora, *, critic: bool = True, checkpointing: bool = False, kept_layers: int = 0
    ) -> None:
        """Add a policy adapter (and a critic) to `model`, which must be frozen. A new adapter changes nothing yet.

        checkpointing: in passes that keep gradients, keep only each layer's input and compute the rest again, but for
        the `kept_layers` uppermost ones, which cost memory instead of time: see `choosing_kept_layers`.
        """
        from peft import get_peft_model

        self.model = model
        self.stack = stack_of(model)
        depth = len(self.stack.layers)
        self.bottom = adapted_layers(lora, depth)[0]  # the lowest adapted layer: the trunk is what is below
        self.width = int(model.get_input_embeddings().weight.shape[-1])
        self.device = model.get_input_embeddings().weight.device
        self.heads = nn.ModuleDict()
        self.kept_layers = min(kept_layers, depth - self.bottom) if checkpointing else depth - self.bottom
        config = lora_config(lora, model, top=True)
        self._peft = get_peft_model(model, config, adapter_name="policy")  # changes `model` in place
        if critic:
            self._peft.add_adapter("critic", config)
            self.heads["critic"] = _head(self.width, self.device)
        self._after_injection()
        self._bypasses = self._make_bypasses()
        self._decoder = model.get_decoder()
        self.check_split()

    # ---- passes -------------------------------------------------------------------------------------------------

    def trunk(self, ids: Tensor, mask: Tensor) -> Trunk:
        """Run the layers below the adapters, without gradients. ids, mask: (batch, sequence)."""
        if self.bottom == 0:
            return Trunk(ids, mask, None)
        above = {index: self._bypasses[index] for index in range(self.bottom, len(self.stack.layers))}
        with torch.no_grad(), self._replaced(above):
            self._run(ids, mask)
            hidden = self._bypasses[self.bottom].seen
        return Trunk(ids, mask, hidden)

    def hidden(self, role: Role, trunk: Trunk) -> Tensor:
        """Final hidden states of `role`, after the last norm: (batch, sequence, width).

        A backward pass must run before another role is activated: a checkpointed layer is computed again then, with
        the adapter that is active at that time.
        """
        self.activate(role)
        return self._above(trunk)

    @torch.no_grad()
    def hidden_of(self, roles: Sequence[Role], trunk: Trunk) -> list[Tensor]:
        """Final hidden states of several roles, without gradients; on a GPU from one pass over the batch once for each.

        So what a layer costs whatever the number of rows, such as dequantising its weights, is paid once. On a CPU it
        would gain nothing, and a row's rounding depends on where it stands in a batch: equal roles would differ by it.
        """
        if self.device.type == "cpu":
            return [self.hidden(role, trunk) for role in roles]
        times = len(roles)
        hidden = None if trunk.hidden is None else trunk.hidden.repeat(times, 1, 1)
        try:
            for layer in self._tuned:
                layer.groups = tuple(roles)
            return list(
                self._above(Trunk(trunk.ids.repeat(times, 1), trunk.mask.repeat(times, 1), hidden)).chunk(times)
            )
        finally:
            for layer in self._tuned:
                layer.groups = None

    def _above(self, trunk: Trunk) -> Tensor:
        replaced: dict[int, nn.Module] = {}
        if trunk.hidden is not None:
            self._bypasses[self.bottom - 1].inject = trunk.hidden
            replaced |= {index: self._bypasses[index] for index in range(self.bottom)}
        if torch.is_grad_enabled():
            layers = self.stack.layers
            recomputed = range(self.bottom, len(layers) - self.kept_layers)
            replaced |= {index: Checkpointed(layers[index]) for index in recomputed}
        with self._replaced(replaced):
            return self._run(trunk.ids, trunk.mask)

    @contextmanager
    def choosing_kept_layers(self, limit: float) -> Iterator[None]:
        """Around a whole update: afterwards the activations of as many layers are kept as `limit` bytes in all allow.

        One layer's are kept meanwhile, and measured. What is computed does not depend on how many are kept.
        """
        layers = len(self.stack.layers) - self.bottom
        if self.kept_layers == layers:
            yield
            return
        self.kept_layers = 1
        begun, most = [0], [0]

        def before(*_: Any) -> None:
            begun[0] = torch.cuda.memory_allocated(self.device)

        def after(*_: Any) -> None:
            most[0] = max(most[0], torch.cuda.memory_allocated(self.device) - begun[0])

        top = self.stack.layers[-1]
        hooks = [top.register_forward_pre_hook(before), top.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if most[0]:
            more = (limit - torch.cuda.memory_reserved(self.device)) / most[0]
            self.kept_layers = max(0, min(layers, 1 + int(more)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of final hidden states, as the model's own forward computes them: (..., vocabulary)."""
        return vocabulary_logits(self.model, hidden)

    def scalar(self, role: Literal["critic", "reward"], hidden: Tensor) -> Tensor:
        """The role's scalar for each hidden state, in float32. hidden: (..., width); returns (...)."""
        value: Tensor = self.heads[role](hidden.float())
        return value.squeeze(-1)

    def values(self, trunk: Trunk) -> Tensor:
        """The critic's value at every position: (batch, sequence), float32."""
        return self.scalar("critic", self.hidden("critic", trunk))

    def scores(self, trunk: Trunk, eos: int | None = None) -> Tensor:
        """The reward adapter's score of each sequence, taken at its last real token: (batch,), float32.

        eos: a token to pass over, as the reward stage does: it reads at the end of the text proper.
        """
        return self.read_scores(self.hidden("reward", trunk), trunk, eos)

    def read_scores(self, hidden: Tensor, trunk: Trunk, eos: int | None = None) -> Tensor:
        """The same from the reward adapter's final hidden states: (batch, sequence, width) -> (batch,)."""
        real = trunk.mask if eos is None else trunk.mask & (trunk.ids != eos)
        last = real.shape[1] - 1 - real.long().flip(-1).argmax(-1)
        return self.scalar("reward", hidden[torch.arange(len(last), device=last.device), last])

    # ---- adapters -----------------------------------------------------------------------------------------------

    def activate(self, role: Role) -> None:
        """Make `role`'s adapter the active one (none for the reference), leaving requires_grad as it is."""
        active = [] if role == "reference" else [role]
        for layer in self._tuned:
            # PEFT's own set_adapter and disable_adapter flip requires_grad of every adapter as a side effect.
            layer._active_adapter = active

    def parameters(self, role: Role) -> list[nn.Parameter]:
        """The adapter's weights and, if the role has one, its head's."""
        found = [p for name, p in self.model.named_parameters() if f".{role}." in name and "lora_" in name]
        return found + (list(self.heads[role].parameters()) if role in self.heads else [])

    def add_reward(self, folder: Path) -> None:
        """Load a frozen reward adapter and its head from an artifact's folder."""
        from peft import LoraConfig
        from safetensors.torch import load_file

        self._peft.add_adapter("reward", LoraConfig.from_pretrained(folder / "adapter"))
        self.load_adapter("reward", folder / "adapter")
        self.heads["reward"] = _head(self.width, self.device)
        self.heads["reward"].load_state_dict(load_file(folder / "head.safetensors"), strict=False)
        self._after_injection()

    def start_critic(self, mean: float, std: float) -> None:
        """Start the critic as the reward model, scaled as the score is: value = (reward - mean) / std.

        Source: N+ details, section 3 (the value model is initialised from the reward model).
        """
        state = self.state("reward")
        self.load_state("critic", state)
        with torch.no_grad():
            self.heads["critic"].weight.div_(std)
            self.heads["critic"].bias.sub_(mean).div_(std)

    def state(self, role: Role) -> dict[str, Tensor]:
        """The role's adapter (names of PEFT's files) and head (`head.*`) as tensors on the CPU."""
        tensors = {
            f"base_model.model.{name.replace(f'.{role}.', '.')}": p.detach().cpu().contiguous()
            for name, p in self.model.named_parameters()
            if f".{role}." in name and "lora_" in name
        }
        if role in self.heads:
            tensors |= {f"head.{name}": t.detach().cpu() for name, t in self.heads[role].state_dict().items()}
        return tensors

    def load_state(self, role: Role, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave. Raises UserError where names or shapes differ."""
        own = dict(self.model.named_parameters())
        expected = set(self.state(role))
        if set(tensors) != expected:
            strange = sorted(set(tensors) ^ expected)[0]
            raise UserError(
                f"{role} adapter: {strange} is on one side only; it was made for another model or other lora"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith("head."):
                    continue
                stem, leaf = name.removeprefix("base_model.model.").rsplit(".", 1)
                parameter = own[f"{stem}.{role}.{leaf}"]
                if parameter.shape != tensor.shape:
                    raise UserError(
                        f"{role} adapter: {name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}; "
                        "lora.rank differs from the one it was trained with"
                    )
                parameter.copy_(tensor)
        if role in self.heads:
            heads = {name.removeprefix("head."): t for name, t in tensors.items() if name.startswith("head.")}
            self.heads[role].load_state_dict(heads)

    def save_adapter(self, role: Role, folder: Path) -> None:
        """Write the role's adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
        weights = {name: t for name, t in self.state(role).items() if not name.startswith("head.")}
        save_adapter(self.model, self._peft.peft_config[role], weights, folder)

    def load_adapter(self, role: Role, folder: Path) -> None:
        """Load the weights of an adapter that `save_adapter` or PEFT wrote; the role's head, if any, stays.

        Raises UserError where names or shapes differ.
        """
        from safetensors.torch import load_file

        weights = load_file(folder / "adapter_model.safetensors")
        heads = {name: t for name, t in self.state(role).items() if name.startswith("head.")}
        self.load_state(role, weights | heads)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _after_injection(self) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._tuned = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        lean_layers(self.model)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()  # master weights of what is trained
                parameter.requires_grad_(".reward." not in name)
        for name, head in self.heads.items():
            head.requires_grad_(name == "critic")
        self.model.eval()  # every dropout off

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        output = self._decoder(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask), use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def _replaced(self, replaced: dict[int, nn.Module]) -> Iterator[None]:
        """Run the model's own forward with some of its layers exchanged: masks and positions stay its own business."""
        kept = {index: self.stack.layers[index] for index in replaced}
        try:
            for index, layer in replaced.items():
                self.stack.layers[index] = layer
            yield
        finally:
            for index, layer in kept.items():
                self.stack.layers[index] = layer
            for bypass in self._bypasses:
                bypass.inject = bypass.seen = None

    def _make_bypasses(self) -> list[Bypass]:
        tuples: dict[int, bool] = {}
        hooks = [
            layer.register_forward_hook(lambda _, __, out, i=i: tuples.__setitem__(i, isinstance(out, tuple)))
            for i, layer in enumerate(self.stack.layers)
        ]
        try:
            with torch.no_grad():
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [Bypass(layer, tuples[i]) for i, layer in enumerate(self.stack.layers)]

    def check_split(self) -> None:
        """Compare trunk, top and logits with the model's own forward on a few tokens. Raises UserError if they differ.

        It costs one short pass and catches an architecture whose forward is not embeddings, layers, norm, head.
        """
        size = min(100, self.model.config.get_text_config().vocab_size)
        ids = torch.arange(1, 9, device=self.device).remainder(size).view(2, 4)
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device=self.device, dtype=torch.bool)
        with torch.no_grad():
            ours = self.logits(self.hidden("policy", self.trunk(ids, mask)))[mask].float()
            own = (
                self.model(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask), use_cache=False)
                .logits[mask]
                .float()
            )
        error = ((ours - own).norm() / own.norm().clamp(min=1e-12)).item()
        if not error < 1e-2:
            raise UserError(
                f"model: {type(self.model).__name__} cannot be run as trunk and top (relative error {error:.1e}); "
                "its forward does more than embeddings, layers, norm and head"
            )


def _head(width: int, device: torch.device) -> nn.Linear:
    head = nn.Linear(width, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
