"""The mathematics of PPO for language models, as pure functions of tensors.

Shapes: `batch` sequences, `response` tokens each; a mask is true on a response's real tokens, EOS included.
Source, unless said otherwise: "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031), called N+ below.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions where mask is true: a scalar. 0 where there are none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale values to unit variance over the positions where mask is true; keep their mean unless shift_mean.

    values, mask: (batch, response). Returns the same shape; masked positions are 0.
    Source: N+, detail "reward and advantage whitening"; variance with Bessel's correction.
    """
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = (((values - mean) ** 2) * mask).sum() / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def truncate_at_eos(responses: Tensor, eos: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each response after its first EOS.

    responses: (batch, response) token ids. Returns the ids with PAD after the EOS, the mask of real tokens, and
    (batch,) whether there was an EOS. Source: N+, detail "truncate after the first EOS".
    """
    is_eos = responses == eos
    after = (is_eos.long().cumsum(-1) - is_eos.long()) > 0
    return responses.masked_fill(after, pad), ~after, is_eos.any(-1)


def token_rewards(score: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Per-token reward: minus coefficient times log(policy / reference) at each token, plus the score at the last.

    score: (batch,); logprobs, reference, mask: (batch, response). Returns (batch, response), 0 where masked.
    Source: N+, detail "per-token KL penalty"; the KL estimate is k1, log p - log q of the sampled token.
    """
    rewards = -coefficient * (logprobs - reference) * mask
    last = mask.long().sum(-1).clamp(min=1) - 1
    return rewards.scatter_add(1, last[:, None], score.to(rewards.dtype)[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens; the value after the last token is 0.

    rewards, values, mask: (batch, response); values[:, t] is the critic's before token t is seen.
    Returns advantages and returns (advantages + values), both 0 where masked.
    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.
    """
    values = values * mask
    rewards = rewards * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, as sums over tokens so that micro-batches add up: (loss, number of clipped tokens).

    All: (batch, response). Divide both by the mini-batch's token count.
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    ratio = torch.exp((logprobs - old) * mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = (torch.maximum(plain, clipped) * mask).sum()
    return loss, ((clipped > plain) & mask).sum()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped squared error, as sums over tokens: (loss, number of clipped tokens).

    0.5 * max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2). All: (batch, response).
    Source: N+, detail "value loss clipping".
    """
    within = torch.minimum(torch.maximum(values, old - clip), old + clip)
    plain = (values - returns) ** 2
    clipped = (within - returns) ** 2
    loss = 0.5 * (torch.maximum(plain, clipped) * mask).sum()
    return loss, ((clipped > plain) & mask).sum()


LogitsOf = Callable[[Tensor], Tensor]
"""(rows, width) -> (rows, vocabulary)."""
CHUNK = 512  # rows of logits held at once


def chunked_logprobs(
    hidden: Tensor, targets: Tensor, logits_of: LogitsOf, temperature: float, chunk: int = CHUNK
) -> Tensor:
    """Log-probability of each target token, never holding more than `chunk` rows of logits.

    hidden: (batch, response, width); targets: (batch, response). Returns (batch, response) in float32.
    A token's log-probability depends on its own hidden state alone, so its gradient is taken in the forward pass,
    while the logits are there, and scaled in the backward pass: they are never computed twice. The output layer's own
    weights get no gradient.
    """
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    parts = [
        _Logprobs.apply(h, target, logits_of, temperature)
        for h, target in zip(rows.split(chunk), ids.split(chunk), strict=True)
    ]
    return torch.cat(parts).view(targets.shape)


@torch.no_grad()
def chunked_logprobs_and_entropy(
    hidden: Tensor, targets: Tensor, logits_of: LogitsOf, temperature: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same without gradients, and the entropy of each token's distribution, both (batch, response)."""
    parts = []
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    for h, target in zip(rows.split(chunk), ids.split(chunk), strict=True):
        logits = logits_of(h).float() / temperature
        total = torch.logsumexp(logits, -1)
        entropy = total - ((logits - total[:, None]).exp() * logits).sum(-1)
        parts.append((_of_target(logits, target, total), entropy))
    logprobs, entropy = (torch.cat(column).view(targets.shape) for column in zip(*parts, strict=True))
    return logprobs, entropy


class _Logprobs(torch.autograd.Function):
    """Rows of hidden states, (rows, width), to the log-probability of each row's target, (rows,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, logits_of: LogitsOf, temperature: float) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return _row_logprobs(hidden, targets, logits_of, temperature)
        with torch.enable_grad():
            own = hidden.detach().requires_grad_()
            logprobs = _row_logprobs(own, targets, logits_of, temperature)
            (gradient,) = torch.autograd.grad(logprobs.sum(), own)
        ctx.save_for_backward(gradient)
        return logprobs.detach()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0][:, None].to(gradient.dtype), None, None, None


def _row_logprobs(hidden: Tensor, targets: Tensor, logits_of: LogitsOf, temperature: float) -> Tensor:
    logits = logits_of(hidden).float() / temperature
    return _of_target(logits, targets, torch.logsumexp(logits, -1))


def _of_target(logits: Tensor, targets: Tensor, total: Tensor) -> Tensor:
    # One formula for every role: policy and reference must agree to the last bit before the first update.
    return logits.gather(-1, targets[:, None]).squeeze(-1) - total


def next_kl_coefficient(coefficient: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """The KL coefficient after a batch of `episodes` whose mean KL was `kl` nats a response.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: proportional control, error clipped to 0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over real tokens: 1 is a perfect critic, 0 a constant one."""
    target = returns[mask]
    spread = target.var() if target.numel() > 1 else target.new_zeros(())
    if spread <= 0:
        return 0.0
    return float(1 - (target - values[mask]).var() / spread)
