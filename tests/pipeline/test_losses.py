"""The formulas of PPO against tensors worked out by hand and against independent formulas in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_pipeline import losses


def ragged(batch: int, response: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, response + 1, (batch,), generator=generator)
    mask = torch.arange(response)[None] < lengths[:, None]
    return torch.randn(batch, response, generator=generator, dtype=torch.float64), mask


def test_masked_whiten_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # mean 2, variance ((1) + 0 + 1) / 2 = 1
    assert torch.allclose(losses.masked_whiten(values, mask), torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]]), atol=1e-6)
    kept = losses.masked_whiten(values, mask, shift_mean=False)
    assert torch.allclose(kept, torch.tensor([[1.0, 2.0, 0], [3.0, 0, 0]]), atol=1e-6)


def test_truncate_at_eos_keeps_the_first_eos_and_pads_what_follows() -> None:
    responses = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 2, 2, 2]])
    ids, mask, ended = losses.truncate_at_eos(responses, eos=2, pad=0)
    assert ids.tolist() == [[5, 2, 0, 0], [5, 6, 7, 8], [2, 0, 0, 0]]
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert ended.tolist() == [True, False, True]


def test_token_rewards_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 5.0]])
    reference = torch.tensor([[-2.0, -2.0, -1.0], [-3.0, -1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = losses.token_rewards(torch.tensor([10.0, 20.0]), logprobs, reference, mask, 0.5)
    # more likely under the policy than under the reference costs; the score sits at the last real token
    assert torch.allclose(rewards, torch.tensor([[-0.5, 0.0, 11.0], [-1.0, 20.0, 0.0]]))


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0]])
    values = torch.tensor([[0.5, 1.0]])
    advantages, returns = losses.gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=0.9, lam=0.5)
    # delta_1 = 2 - 1 = 1; delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4; A_0 = 1.4 + 0.45 * 1
    assert torch.allclose(advantages, torch.tensor([[1.85, 1.0]]))
    assert torch.allclose(returns, torch.tensor([[2.35, 2.0]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_sum_of_discounted_errors(b: int, n: int, seed: int, gamma: float, lam: float) -> None:
    rewards, mask = ragged(b, n, seed)
    values, _ = ragged(b, n, seed + 1)
    advantages, returns = losses.gae(rewards, values, mask, gamma, lam)
    for row in range(b):
        length = int(mask[row].sum())
        for t in range(length):
            expected = 0.0
            for later in range(t, length):
                following = values[row, later + 1].item() if later + 1 < length else 0.0
                delta = rewards[row, later].item() + gamma * following - values[row, later].item()
                expected += (gamma * lam) ** (later - t) * delta
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-9)
        assert not advantages[row, length:].any()


def test_policy_loss_by_hand() -> None:
    old = torch.zeros(1, 4)
    new = torch.log(torch.tensor([[1.5, 0.5, 1.5, 1.0]]))
    advantages = torch.tensor([[1.0, 1.0, -1.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss, clipped = losses.policy_loss(new, old, advantages, mask, clip=0.2)
    # min(1.5, 1.2) * 1 = 1.2 (clipped); min(0.5, 0.8) = 0.5; min(-1.5, -1.2) = -1.5
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5))
    assert clipped.item() == 1


def test_value_loss_by_hand() -> None:
    old = torch.zeros(1, 3)
    values = torch.tensor([[1.0, 0.1, 9.0]])
    returns = torch.tensor([[1.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    loss, clipped = losses.value_loss(values, old, returns, mask, clip=0.2)
    # first: the clipped value 0.2 is worse, (0.2 - 1)^2 = 0.64; second: within the clip, 0.81
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.81))
    assert clipped.item() == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 999))
def test_losses_equal_numpy_in_float64(b: int, n: int, seed: int) -> None:
    new, mask = ragged(b, n, seed)
    old, _ = ragged(b, n, seed + 1)
    advantages, _ = ragged(b, n, seed + 2)
    loss, _ = losses.policy_loss(new, old, advantages, mask, 0.2)
    ratio = np.exp(new.numpy() - old.numpy())
    objective = np.minimum(ratio * advantages.numpy(), np.clip(ratio, 0.8, 1.2) * advantages.numpy())
    assert loss.item() == pytest.approx(-objective[mask.numpy()].sum(), rel=1e-9)
    loss, _ = losses.value_loss(new, old, advantages, mask, 0.2)
    bounded = np.clip(new.numpy(), old.numpy() - 0.2, old.numpy() + 0.2)
    squared = np.maximum((new.numpy() - advantages.numpy()) ** 2, (bounded - advantages.numpy()) ** 2)
    assert loss.item() == pytest.approx(0.5 * squared[mask.numpy()].sum(), rel=1e-9)


class LargestTensor(TorchDispatchMode):
    """Watches every operation, forward and backward, for the largest tensor it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def full_logprobs(hidden: Tensor, targets: Tensor, head: nn.Linear, temperature: float) -> Tensor:
    return torch.log_softmax(head(hidden) / temperature, -1).gather(-1, targets[..., None]).squeeze(-1)


def test_chunked_logprobs_equal_full_ones_and_never_hold_all_logits() -> None:
    torch.manual_seed(0)
    batch, response, width, vocabulary, chunk = 4, 16, 8, 1000, 5
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(batch, response, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (batch, response))
    weights = torch.randn(batch, response)

    watch = LargestTensor()
    with watch:
        ours = losses.chunked_logprobs(hidden, targets, head, 0.7, chunk)
        (ours * weights).sum().backward()
    assert watch.elements <= max(chunk * vocabulary, head.weight.numel())
    gradient, hidden.grad = hidden.grad, None

    with LargestTensor() as naive:
        full = full_logprobs(hidden, targets, head, 0.7)
        (full * weights).sum().backward()
    assert naive.elements == batch * response * vocabulary  # the watch does see such a tensor

    assert torch.allclose(ours, full, atol=1e-5)
    assert torch.allclose(gradient, hidden.grad, atol=1e-5)
    assert head.weight.grad is None


def test_logprobs_with_entropy() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 100, bias=False), torch.randn(3, 7, 8)
    targets = torch.randint(0, 100, (3, 7))
    logprobs, entropy = losses.chunked_logprobs_and_entropy(hidden, targets, head, 0.7, chunk=5)
    assert torch.allclose(logprobs, full_logprobs(hidden, targets, head, 0.7), atol=1e-5)
    probabilities = torch.softmax(head(hidden) / 0.7, -1)
    assert torch.allclose(entropy, -(probabilities * probabilities.log()).sum(-1), atol=1e-4)


def test_kl_controller_moves_towards_its_target() -> None:
    assert losses.next_kl_coefficient(0.1, kl=12.0, target=6.0, horizon=100, episodes=10) == pytest.approx(0.102)
    assert losses.next_kl_coefficient(0.1, kl=0.0, target=6.0, horizon=100, episodes=10) == pytest.approx(0.098)
    assert losses.next_kl_coefficient(0.1, kl=6.6, target=6.0, horizon=100, episodes=10) == pytest.approx(0.101)


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert losses.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert losses.explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert math.isclose(losses.explained_variance(returns, torch.ones(1, 4), mask), 0.0)
