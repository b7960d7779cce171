"""Sampling responses: a static KV cache, and on CUDA one graph for the whole decode step, sampling included."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.decode.decoder import Decoder, Session, decoder_of, forget
from rlhf_pipeline.decode.layers import Unknown
from rlhf_pipeline.decode.nf4_gemm import MAX_ROWS
from rlhf_pipeline.losses import truncate_at_eos
from rlhf_pipeline.roles import positions_of
from rlhf_pipeline.stack import stack_of

STOP_CHECK_STEPS = 16  # on CUDA, asking whether all have ended waits for the device: ask this seldom
WARMUP_STEPS = 2  # before a graph is captured
AGREEMENT = 0.1  # relative difference between the fused step's logits and the model's own; bfloat16 alone gives 0.01


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_p below 1 keeps the smallest set of tokens that reaches it."""

    response_tokens: int
    eos: int
    pad: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Responses:
    """Prompts with what was sampled after them."""

    ids: Tensor  # (batch, prompt + response), PAD left of the prompt and after EOS
    mask: Tensor  # the same shape, true where a token is real
    prompt_tokens: int
    ended: Tensor  # (batch,), whether there was an EOS
    trunk: Tensor | None = None  # (batch, prompt + response, width), input of a layer, where sampling has kept it

    @property
    def response_ids(self) -> Tensor:
        """(batch, response)."""
        return self.ids[:, self.prompt_tokens :]

    @property
    def response_mask(self) -> Tensor:
        """(batch, response), EOS included."""
        return self.mask[:, self.prompt_tokens :]


@torch.no_grad()
def rollout(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    rows: int | None = None,
    trunk_layers: int = 0,
    seeds: Sequence[int] | None = None,
) -> Responses:
    """Sample a response to each prompt from `model` with its active adapter, `rows` prompts at a time.

    ids, mask: (batch, prompt), padded on the left. Draws from PyTorch's global generator of the device: seed it first,
    or give `seeds`, one for each `rows` prompts: then these get the same responses whatever is sampled beside them.
    trunk_layers: also keep what comes out of so many layers, where the fused step decodes. The cache lives only as long
    as this call.
    """
    decoders = []
    parts = zip(ids.split(rows or len(ids)), mask.bool().split(rows or len(ids)), strict=True)
    for index, (prompts, real) in enumerate(parts):
        if seeds is not None:
            torch.manual_seed(seeds[index])
        decoders.append(_Decoder(model, prompts, real, sampling, trunk_layers).run())
    raw = torch.cat([response for response, _ in decoders])
    trunks = [trunk for _, trunk in decoders if trunk is not None]
    response, real, ended = truncate_at_eos(raw, sampling.eos, sampling.pad)
    return Responses(
        torch.cat([ids, response], 1),
        torch.cat([mask.bool(), real], 1),
        prompt_tokens=ids.shape[1],
        ended=ended,
        trunk=torch.cat(trunks) if len(trunks) == len(decoders) else None,
    )


def sample(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row. logits: (batch, vocabulary); returns (batch,). Capturable in a CUDA graph."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    # argmax of p / Exponential(1) has distribution p; unlike multinomial it needs no synchronisation.
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1)


class _Decoder:
    """One batch from prefill to the last token."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor, sampling: Sampling, trunk_layers: int = 0) -> None:
        from transformers import DynamicCache, StaticCache

        self.model, self.ids, self.prompt_mask, self.sampling = model, ids, mask, sampling
        self.trunk_layers = trunk_layers
        batch, prompt = ids.shape
        total = prompt + sampling.response_tokens
        config = model.config.get_text_config()
        device = ids.device
        # Layers with a sliding window keep a cache of their own length and need masks of their own: such a model
        # builds its masks itself and is decoded eagerly.
        self.windowed = getattr(config, "sliding_window", None) is not None or any(
            kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()
        )
        if self.windowed:
            self.cache = DynamicCache(config=config)
        else:
            self.cache = StaticCache(config=config, max_cache_len=total)
        # bitsandbytes' int8 product asks the device for outliers on each call, which a graph cannot hold.
        self.capturable = ids.is_cuda and not self.windowed and not getattr(model, "is_loaded_in_8bit", False)
        self.additive = config._attn_implementation != "sdpa"
        self.real = torch.zeros(batch, total, dtype=torch.bool, device=device)  # cache slots that may be attended to
        self.real[:, :prompt] = mask
        self.slot = torch.full((1,), prompt, dtype=torch.long, device=device)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = mask.long().sum(-1, keepdim=True)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.out = torch.full((batch, sampling.response_tokens), sampling.pad, dtype=torch.long, device=device)
        self.fused: Decoder | None = None
        self.warm = False  # whether each kernel of a step has run in this process
        self.session = Session(
            [], [], (prompt - mask.sum(-1)).int(), torch.full_like(self.position[:, 0], prompt).int()
        )

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Token ids of the responses, (batch, response), PAD after EOS; and the trunk, where it is kept."""
        seen = self._prefill()
        steps = self.sampling.response_tokens - 1
        if self.capturable and steps > 0:
            self.fused = self._fused()
        if self.fused and seen is not None:
            # Zeros where nothing is ever written: what attention passes over must still be a number.
            self.session.trunk = seen.new_zeros(*self.real.shape, seen.shape[-1])
            self.session.trunk[:, : self.ids.shape[1]] = seen
            self.session.trunk_layers = self.trunk_layers
        cuda = self.ids.is_cuda
        step: Callable[[], None] = self._step
        if self.capturable and steps > 2 * WARMUP_STEPS:
            step = self._captured()
        for index in range(steps):
            if (not cuda or index % STOP_CHECK_STEPS == 0) and bool(self.finished.all()):
                break
            step()
        if cuda:
            # The graph's memory goes with the graph, back to the device if asked: not while the graph still runs.
            torch.cuda.current_stream(self.ids.device).synchronize()
        if self.fused and self.session.trunk is not None:
            self.fused.step(self.token[:, 0], self.session, trunk_only=True)  # of the token drawn last
        return self.out, self.session.trunk

    def _prefill(self) -> Tensor | None:
        """Fill the cache and draw the first token. Returns the prompts' trunk, if any is wanted."""
        prompt = self.ids.shape[1]
        causal = torch.ones(prompt, self.real.shape[1], dtype=torch.bool, device=self.ids.device).tril()
        # A query on padding attends to itself: a row without any key would be NaN and spread through the cache.
        own = torch.eye(prompt, self.real.shape[1], dtype=torch.bool, device=self.ids.device)
        allowed = (causal & self.real[:, None, None, :]) | own
        with self._watching_the_trunk() as seen:
            output = self.model(
                input_ids=self.ids,
                attention_mask=self.prompt_mask.long() if self.windowed else self._as_mask(allowed),
                position_ids=positions_of(self.prompt_mask),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._emit(output.logits[:, -1], torch.zeros_like(self.slot))
        return seen[0] if seen else None

    @contextmanager
    def _watching_the_trunk(self) -> Iterator[list[Tensor]]:
        """What goes into the layer above the trunk meanwhile; nothing where no trunk is wanted."""
        seen: list[Tensor] = []
        if not self.trunk_layers:
            yield seen
            return
        hook = (
            stack_of(self.model)
            .layers[self.trunk_layers]
            .register_forward_pre_hook(
                lambda _, given, named: seen.append(given[0] if given else named["hidden_states"]), with_kwargs=True
            )
        )
        try:
            yield seen
        finally:
            hook.remove()

    def _step(self) -> None:
        # The token drawn last goes into the cache at `slot`, and may be attended to from now on.
        logits = self.fused.step(self.token[:, 0], self.session) if self.fused else self._own_logits()
        self.position.add_(1)
        self.slot.add_(1)
        self.session.slot.add_(1)
        self._emit(logits, self.slot - self.ids.shape[1])

    def _own_logits(self) -> Tensor:
        self.real.index_fill_(1, self.slot, True)
        seen = (
            self.real[:, : int(self.slot) + 1].long() if self.windowed else self._as_mask(self.real[:, None, None, :])
        )
        output = self.model(
            input_ids=self.token,
            attention_mask=seen,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _emit(self, logits: Tensor, index: Tensor) -> None:
        drawn = sample(logits, self.sampling.temperature, self.sampling.top_p)
        drawn = drawn.masked_fill(self.finished, self.sampling.pad)
        self.out.index_copy_(1, index, drawn[:, None])
        self.finished.logical_or_(drawn == self.sampling.eos)
        self.token.copy_(drawn[:, None])

    def _as_mask(self, allowed: Tensor) -> Tensor:
        if not self.additive:
            return allowed
        dtype = self.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def _fused(self) -> Decoder | None:
        """The step on fused kernels, if the model has one and it agrees with the model's own forward."""
        decoder = decoder_of(self.model)
        if decoder is None or len(self.ids) > MAX_ROWS:
            return None
        self.session.keys = [layer.keys for layer in self.cache.layers]
        self.session.values = [layer.values for layer in self.cache.layers]
        try:
            new = decoder.prepare(len(self.ids))
        except Unknown as reason:
            forget(self.model, reason)
            return None
        self.warm = not new
        if new:
            restore = self._keep()
            own = self._own_logits().float()
            restore()
            difference = float((decoder.step(self.token[:, 0], self.session).float() - own).norm() / own.norm())
            restore()
            if not difference < AGREEMENT:
                forget(self.model, f"the fused step's logits differ from its own by {difference:.1e}")
                return None
        return decoder

    def _keep(self) -> Callable[[], None]:
        """A function that puts back what a step changes, its cache slot apart, which is written before it is read.

        The draws too: what is sampled must not depend on whether this process has sampled before.
        """
        device = self.ids.device
        generator = torch.cuda.default_generators[device.index] if self.ids.is_cuda else torch.default_generator
        draws = generator.get_state()
        state = (self.real, self.slot, self.token, self.position, self.finished, self.out, self.session.slot)
        state += tuple(layer.cumulative_length for layer in self.cache.layers)
        kept = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)
            generator.set_state(draws)

        return restore

    def _captured(self) -> Callable[[], None]:
        """The decode step as a CUDA graph; what warming up and capturing changed is put back."""
        restore = self._keep()
        stream = _side_stream(self.ids.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(0 if self.warm else WARMUP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        restore()
        return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are warmed up on: each further one would keep a cuBLAS workspace, 32 MiB on Hopper."""
    return torch.cuda.Stream(device)
