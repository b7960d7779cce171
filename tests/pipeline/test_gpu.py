"""What only a CUDA device can show: the decode graph, NF4 and int8 bases, checkpointing and the paged optimiser."""

import gc
from pathlib import Path

import pytest
import torch
from gpus import on_gpu
from tiny import EOS, PAD, VOCABULARY, Family, build_tiny_model
from torch import Tensor

from rlhf_api.run import GPU, PPO, Lora, Quantization
from rlhf_pipeline.models import device_of, load_base
from rlhf_pipeline.ppo_trainer import Trainer
from rlhf_pipeline.roles import Roles, Trunk, positions_of
from rlhf_pipeline.rollout import Responses, Sampling, _Decoder, rollout

pytestmark = on_gpu

# int8 writes device memory from the host inside its forward, so only eager decoding runs there.
QUANTIZATIONS = [Quantization(type="none", compute_dtype="float32"), Quantization(type="none"), Quantization()]


def roles_of(folder: Path, quantization: Quantization, layers: str = "top:1", family: Family = "llama") -> Roles:
    device = device_of(GPU())
    model = load_base(build_tiny_model(folder, family, hidden=64), quantization, device)
    torch.manual_seed(0)
    return Roles(model, Lora(rank=4, layers=layers), checkpointing=True)


def prompts(rows: int = 8, longest: int = 7) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCABULARY, (rows, longest), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, longest, dtype=torch.bool)
    mask[0, :5] = False
    return ids.masked_fill(~mask, PAD).cuda(), mask.cuda()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "qwen3"])
def test_the_graph_decodes_what_single_steps_do(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = roles_of(tmp_path, Quantization(type="none", compute_dtype="float32"), family=family)
    ids, mask = prompts()
    sampling = Sampling(24, EOS, PAD, temperature=0)
    replayed = rollout(roles.model, ids, mask, sampling)
    monkeypatch.setattr(_Decoder, "_captured", lambda decoder: decoder._step)
    assert torch.equal(rollout(roles.model, ids, mask, sampling).ids, replayed.ids)
    assert len(replayed.response_ids.unique()) > 4


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=["fp32", "bf16", "nf4"])
def test_sampling_in_the_graph_repeats_with_its_seed(quantization: Quantization, tmp_path: Path) -> None:
    roles = roles_of(tmp_path, quantization)
    ids, mask = prompts()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(rollout(roles.model, ids, mask, Sampling(24, EOS, PAD)).ids)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("layers", ["all", "top:1"])
@pytest.mark.parametrize(
    "quantization", [*QUANTIZATIONS, Quantization(type="int8")], ids=["fp32", "bf16", "nf4", "int8"]
)
def test_ppo_trains_on_the_card(quantization: Quantization, layers: str, tmp_path: Path) -> None:
    roles = roles_of(tmp_path, quantization, layers)
    settings = PPO(
        episodes=32, batch_size=8, mini_batch_size=8, micro_batch_size=4, response_tokens=12, prompt_tokens=7,
        learning_rate=1e-2, epochs=2, missing_eos_penalty=None,
    )  # fmt: skip

    def score(trunk: Trunk, responses: Responses) -> Tensor:
        return (responses.response_ids % 2 == 0).float().mean(-1)

    trainer = Trainer(roles, settings, score, EOS, PAD, seed=1)
    ids, mask = prompts()
    reference = roles.logits(roles.hidden("reference", roles.trunk(ids, mask)))
    first = trainer.step(ids, mask)
    # Not to the bit: both are in one batch, and a row's rounding may depend on where it stands there.
    assert first["kl"] == pytest.approx(0, abs=1e-5 if quantization.compute_dtype == "float32" else 0.02)
    for _ in range(3):
        metrics = trainer.step(ids, mask)
    assert metrics["kl"] != 0
    assert torch.equal(roles.logits(roles.hidden("reference", roles.trunk(ids, mask))), reference)
    own = roles.model(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask)).logits
    roles.activate("policy")
    changed = roles.model(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask)).logits
    assert not torch.equal(own, changed)


def test_later_updates_keep_the_activations_that_fit_and_compute_the_same(tmp_path: Path) -> None:
    found = []
    for spare in (0, 2**60):
        roles = roles_of(tmp_path / str(spare), Quantization(type="none", compute_dtype="float32"), "all")
        settings = PPO(
            episodes=32, batch_size=8, mini_batch_size=8, micro_batch_size=4, response_tokens=12, prompt_tokens=7,
            learning_rate=1e-2, epochs=2, missing_eos_penalty=None,
        )  # fmt: skip
        trainer = Trainer(roles, settings, lambda _, r: (r.response_ids % 2 == 0).float().mean(-1), EOS, PAD, seed=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rlhf_pipeline.ppo_trainer.SPARE_BYTES", spare)
            metrics = [trainer.step(*prompts()) for _ in range(3)]
        found.append((roles.kept_layers, [(each["policy_loss"], each["value_loss"], each["kl"]) for each in metrics]))
    (all_kept, losses), (none_kept, recomputed) = found
    assert (all_kept, none_kept) == (3, 0)
    assert [value for row in losses for value in row] == pytest.approx(
        [value for row in recomputed for value in row], rel=1e-3, abs=1e-5
    )


def test_a_graphs_memory_is_kept_until_it_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With segments that can be unmapped, as a stage has them: that does not wait for the device."""
    roles = roles_of(tmp_path, Quantization(type="none", compute_dtype="float32"))
    ids, mask = prompts()
    own = _Decoder._own_logits

    def slow(decoder: _Decoder) -> Tensor:
        logits = own(decoder)
        torch.cuda._sleep(20_000_000)  # some 10 ms a step, so that the device is far behind
        return logits

    monkeypatch.setattr(_Decoder, "_own_logits", slow)
    found = []
    for _ in range(4):
        torch.manual_seed(1)
        found.append(rollout(roles.model, ids, mask, Sampling(14, EOS, PAD)).ids)
        torch.cuda.empty_cache()
        torch.empty(2**28, dtype=torch.uint8, device="cuda").fill_(255)  # over what was given back
    torch.cuda.synchronize()
    assert all(torch.equal(each, found[0]) for each in found)


def test_rollouts_leave_no_memory_behind(tmp_path: Path) -> None:
    roles = roles_of(tmp_path, Quantization(type="none"))
    ids, mask = prompts()
    reserved = []
    for _ in range(6):
        rollout(roles.model, ids, mask, Sampling(24, EOS, PAD))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]  # the first one makes what is kept for all


def test_a_process_keeps_within_the_memory_asked_for() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    device = device_of(GPU(memory="9Gi"))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(17 * 2**29, dtype=torch.uint8, device=device)
        torch.empty(4 * 2**30, dtype=torch.uint8, device=device)
    finally:
        device_of(GPU(memory="1000Gi"))
        torch.cuda.set_per_process_memory_fraction(1.0)
