"""The mathematics of PPO for language models, as pure functions of tensors.

Shapes: `batch` sequences, `response` tokens each; a mask is true on a response's real tokens, EOS included.
Source, unless said otherwise: "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031), called N+ below.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    temperature: float,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy there, never holding more than `chunk` rows of logits.

    hidden: (batch, response, width); targets: (batch, response). logits_of: (rows, width) -> (rows, vocabulary).
    Returns (logprobs, entropy), both (batch, response) in float32; entropy carries no gradient. In the backward pass
    each chunk's logits are computed again.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    ids = targets.reshape(-1)

    def of_chunk(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(h).float() / temperature
        logprobs = torch.log_softmax(logits, -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, target[:, None]).squeeze(-1), entropy

    parts = []
    for h, target in zip(rows.split(chunk), ids.split(chunk), strict=True):
        if torch.is_grad_enabled() and h.requires_grad:
            parts.append(checkpoint(of_chunk, h, target, use_reentrant=False))
        else:
            parts.append(of_chunk(h, target))
    logprobs = torch.cat([part[0] for part in parts]).view(targets.shape)
    entropy = torch.cat([part[1] for part in parts]).view(targets.shape)
    return logprobs, entropy


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
