"""Sampling: the tokens that generate() would give, for every family, and the distribution it should have."""

from pathlib import Path

import pytest
import torch
from tiny import EOS, FAMILIES, PAD, VOCABULARY, Family, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_pipeline.rollout import Sampling, rollout, sample


def prompts(rows: int = 4, longest: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (rows, longest), generator=generator)
    lengths = torch.tensor([longest, 2, 5, 1])[:rows]
    mask = torch.arange(longest)[None] >= longest - lengths[:, None]
    return ids.masked_fill(~mask, PAD), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: Family, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path, family)).eval()
    ids, mask = prompts()
    ours = rollout(model, ids, mask, Sampling(20, EOS, PAD, temperature=0))
    theirs = model.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    theirs = torch.nn.functional.pad(theirs, (0, ours.ids.shape[1] - theirs.shape[1]), value=PAD)
    assert torch.equal(ours.ids, theirs)
    assert len(ours.response_ids.unique()) > 4  # not one token over and over


def test_a_response_stops_at_eos(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path)).eval()
    ids, mask = prompts()
    free = rollout(model, ids, mask, Sampling(12, eos=-1, pad=PAD, temperature=0))
    eos = int(free.response_ids[0, 4])
    first = int((free.response_ids[0] == eos).nonzero()[0])
    ours = rollout(model, ids, mask, Sampling(12, eos=eos, pad=PAD, temperature=0))
    assert ours.ended[0]
    assert torch.equal(ours.response_ids[0, : first + 1], free.response_ids[0, : first + 1])
    assert (ours.response_ids[0, first + 1 :] == PAD).all()
    assert ours.response_mask[0].tolist() == [True] * (first + 1) + [False] * (11 - first)


def test_decoding_in_parts_gives_the_same_greedy_tokens(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path)).eval()
    ids, mask = prompts()
    sampling = Sampling(8, EOS, PAD, temperature=0)
    assert torch.equal(rollout(model, ids, mask, sampling).ids, rollout(model, ids, mask, sampling, rows=3).ids)


def test_a_seed_repeats_and_another_differs(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path)).eval()
    ids, mask = prompts()

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return rollout(model, ids, mask, Sampling(10, EOS, PAD)).ids

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3)])
def test_draws_follow_temperature_and_top_p(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    expected = torch.softmax(logits / temperature, -1)
    kept, mass = [], 0.0
    for token in expected.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(expected[token])
    expected = torch.stack([expected[t] if t in kept else torch.tensor(0.0) for t in range(5)])
    expected = expected / expected.sum()
    draws = 40_000
    counts = sample(logits.expand(draws, -1), temperature, top_p).bincount(minlength=5) / draws
    # five standard errors of a binomial
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-12).all()
