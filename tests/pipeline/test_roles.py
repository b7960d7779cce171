"""Four roles on one base: they agree with the model's own forward, and training one leaves the others alone."""

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, PAD, VOCABULARY, Family, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_api.errors import UserError
from rlhf_api.run import Lora, Quantization
from rlhf_pipeline.models import load_base
from rlhf_pipeline.roles import Roles, positions_of


def roles_of(folder: Path, family: Family = "llama", layers: str = "top:1", *, checkpointing: bool = False) -> Roles:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(folder, family)).requires_grad_(False)
    roles = Roles(model, Lora(rank=4, layers=layers), checkpointing=checkpointing)
    torch.manual_seed(5)
    for role in ("policy", "critic"):
        for parameter in roles.parameters(role):
            parameter.data.normal_(std=0.1)
    return roles


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = False  # padding on the left
    mask[1, 7:] = False  # after EOS
    return ids.masked_fill(~mask, PAD), mask


@pytest.mark.parametrize("layers", ["all", "top:1", "top:2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_equals_the_full_forward(family: Family, layers: str, tmp_path: Path) -> None:
    roles = roles_of(tmp_path, family, layers)
    ids, mask = batch()
    trunk = roles.trunk(ids, mask)
    assert (trunk.hidden is None) == (layers == "all")
    seen = []
    for role in ("policy", "critic", "reference"):
        ours = roles.logits(roles.hidden(role, trunk))
        own = roles.model(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask)).logits
        assert torch.equal(ours[mask], own[mask])
        seen.append(ours[mask])
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


def test_the_reference_is_the_untouched_base(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "again")
    ids, mask = batch()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = plain(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask)).logits
    roles = roles_of(tmp_path / "roles")
    assert torch.equal(roles.logits(roles.hidden("reference", roles.trunk(ids, mask)))[mask], expected[mask])


def test_a_quantised_base_computes_the_same_with_and_without_a_gradient(tmp_path: Path) -> None:
    # bitsandbytes has a second arithmetic for CPUs with AVX512-BF16, which it takes where there is no gradient.
    model = load_base(build_tiny_model(tmp_path, hidden=64), Quantization(type="nf4"), torch.device("cpu"))
    inputs = model.get_input_embeddings()(batch()[0])
    trained = model(inputs_embeds=inputs.detach().requires_grad_()).logits
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=inputs).logits, trained)


@pytest.mark.parametrize("layers", ["all", "top:1"])
def test_checkpointing_gives_the_same_gradients(layers: str, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        roles = roles_of(tmp_path / str(checkpointing), layers=layers, checkpointing=checkpointing)
        roles.hidden("policy", roles.trunk(*batch())).square().sum().backward()
        gradients.append([p.grad.clone() for p in roles.parameters("policy")])
        assert all(p.grad is None for p in roles.parameters("critic"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("limit", "kept"), [(1_000, 1), (1_399, 1), (1_400, 2), (9_999, 3), (0, 0)])
def test_later_updates_keep_as_many_layers_as_the_memory_holds(
    limit: float, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device's counters played: a layer's forward leaves 400 bytes behind, and 1,000 are taken in all."""
    taken = iter(range(0, 100_000, 400))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(taken))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1_000)
    roles = roles_of(tmp_path, layers="all", checkpointing=True)
    gradients = []
    for _ in range(2):
        with roles.choosing_kept_layers(limit):
            roles.hidden("policy", roles.trunk(*batch())).square().sum().backward()
        gradients.append([p.grad.clone() for p in roles.parameters("policy")])
        roles.model.zero_grad()
    assert roles.kept_layers == kept
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_score_is_taken_at_the_last_real_token(tmp_path: Path) -> None:
    roles = roles_of(tmp_path)
    roles.heads["reward"] = roles.heads["critic"]
    ids, mask = batch()
    scores = roles.scores(roles.trunk(ids, mask))
    hidden = roles.hidden("reward", roles.trunk(ids, mask))
    for row, last in enumerate((8, 6, 8)):
        assert torch.allclose(scores[row], roles.scalar("reward", hidden[row, last]))


def test_an_adapter_survives_saving_and_loading(tmp_path: Path) -> None:
    roles = roles_of(tmp_path / "a")
    roles.save_adapter("policy", tmp_path / "adapter")
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "b")).eval()
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids, mask = batch()
    expected = loaded(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask)).logits
    ours = roles.logits(roles.hidden("policy", roles.trunk(ids, mask)))
    assert torch.allclose(ours[mask], expected[mask], atol=1e-5)
    fresh = roles_of(tmp_path / "c")
    for parameter in fresh.parameters("policy"):
        parameter.data.zero_()
    fresh.load_adapter("policy", tmp_path / "adapter")
    assert torch.equal(fresh.logits(fresh.hidden("policy", fresh.trunk(ids, mask)))[mask], ours[mask])


def test_an_adapter_of_other_rank_is_refused(tmp_path: Path) -> None:
    roles = roles_of(tmp_path / "a")
    roles.save_adapter("policy", tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "b")).requires_grad_(False)
    with pytest.raises(UserError, match=r"lora\.rank differs"):
        Roles(model, Lora(rank=8, layers="top:1")).load_adapter("policy", tmp_path / "adapter")


def test_more_layers_than_the_model_has_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path))
    with pytest.raises(UserError, match=r"lora\.layers: top:9 asks for more layers than the model's 3"):
        Roles(model, Lora(layers="top:9"))
