"""The evaluate stage on a tiny model, and trying out its policy."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_runs import StageRuns
from tiny import build_tiny_model

from rlhf_api.errors import UserError
from rlhf_api.run import Lora, Quantization
from rlhf_api.stage import ArtifactRef, StageConfig, StageSettings, stage_digest
from rlhf_pipeline import evaluate, generate
from rlhf_pipeline.models import load_base, load_tokenizer
from rlhf_pipeline.prompts import Prompts
from rlhf_pipeline.reward_models import RewardCard
from rlhf_pipeline.roles import Roles, Trunk
from rlhf_pipeline.rollout import Responses, Sampling
from rlhf_pipeline.scoring import load_score
from rlhf_store.artifacts import Manifest

LORA = {"rank": 2, "alpha": 64, "layers": "top:2"}
PROMPTS = ["the film", "a good story about", "the", "it was", "one of the best", "the plot of the film", "a"]
GOOD = ["a wonderful warm film", "great acting and a great script", "lovely and funny", "a joy to watch"]
BAD = ["a terrible cold film", "awful acting and a bad script", "boring and dull", "a pain to watch"]


class Bench:
    """Artifacts of a tiny run up to the policy."""

    def __init__(self, root: Path) -> None:
        self.runs = StageRuns(root)
        folder = build_tiny_model(root / "model")
        tokenizer = load_tokenizer(folder)
        roles = Roles(load_base(folder, Quantization(type="none"), torch.device("cpu")), Lora(**LORA))
        generator = torch.Generator().manual_seed(0)
        for role in ("policy", "critic"):
            for parameter in roles.parameters(role):
                parameter.data.normal_(0, 0.3, generator=generator)
        roles.save_adapter("policy", root / "policy" / "adapter")
        (root / "policy" / "report.json").write_text('{"score_mean": 0.5, "score_std": 2.0}')
        (root / "policy" / "logs").mkdir()
        (root / "policy" / "logs" / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "reward": 0.25}\n')
        roles.save_adapter("critic", root / "reward" / "adapter")  # any adapter with a head will do as a reward
        head = roles.heads["critic"].weight.detach()
        save_file({"weight": head}, root / "reward" / "head.safetensors")
        RewardCard("adapter").save(root / "reward")
        texts = {"text": GOOD * 4 + BAD * 4, "label": [True] * 16 + [False] * 16}
        rows = {"prompt": PROMPTS, "input_ids": [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]}
        self.inputs: dict[str, ArtifactRef] = {
            "model": self.runs.put("merged-model", folder),
            "policy": self._put_policy(root / "policy"),
            "reward": self.runs.put("reward-model", root / "reward"),
            "prompts": self.runs.put_tables("prompt-data", pa.table(rows), pa.table(rows)),
            "data": self.runs.put_tables("evaluation-data", pa.table(texts), pa.table(texts)),
        }

    def _put_policy(self, folder: Path) -> ArtifactRef:
        ref = ArtifactRef(kind="policy", digest="c" * 64)
        writer = self.runs.artifacts.writer(ref, "1")
        writer.add_folder(folder)
        settings = {"lora": LORA, "quantization": {"type": "none"}}
        writer.commit({"config": {"stage": "ppo", "settings": settings}, "seconds": 12.5})
        return ref

    def config(self, **evaluate: object) -> StageConfig:
        section = {"samples": 6, "batch_size": 4, **evaluate}
        settings = StageSettings.model_validate(
            {
                "quantization": {"type": "none"},
                "lora": LORA,
                "ppo": {"responseTokens": 8, "microBatchSize": 2, "batchSize": 4},
                "evaluate": {name: value for name, value in section.items() if value is not None},
                "seed": 3,
            }
        )
        output = ArtifactRef(kind="evaluation", digest=stage_digest("evaluate", settings, self.inputs))
        return StageConfig.model_validate(
            {
                "run": {"name": "tiny"},
                "stage": "evaluate",
                "program": "evaluate",
                "settings": settings,
                "inputs": self.inputs,
                "output": output,
                "store": self.runs.store,
                "gpu": {"count": 0},
            }
        )

    def read(self, manifest: Manifest) -> tuple[dict, list[dict], str]:
        folder = self.runs.fetch(manifest)
        rows = [json.loads(line) for line in (folder / "generations.jsonl").read_bytes().split(b"\n") if line]
        return json.loads((folder / "report.json").read_text()), rows, (folder / "logs" / "report.html").read_text()


SCORERS = [{"name": "vader", "function": "rlhf_pipeline.scorers:vader"}, {"name": "classifier", "fitted": True}]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def evaluated(bench: Bench) -> Manifest:
    return bench.runs.run(bench.config(scorers=SCORERS))


def test_the_report_says_what_the_generations_say(bench: Bench, evaluated: Manifest) -> None:
    report, rows, page = bench.read(evaluated)
    assert [row["prompt"] for row in rows] == PROMPTS[:6]
    assert report["samples"] == 6
    for name in ("reward", "vader", "classifier"):

        def of(side: str, name: str = name) -> list[float]:
            return [row[side]["reward"] if name == "reward" else row[side]["scores"][name] for row in rows]

        compared = report["reward"] if name == "reward" else report["scorers"][name]
        rise = [after - before for before, after in zip(of("reference"), of("policy"), strict=True)]
        assert compared["rise"]["mean"] == pytest.approx(sum(rise) / 6)
        assert compared["win_rate"]["wins"] == sum(value > 0 for value in rise)
    assert report["kl"]["mean"] == pytest.approx(sum(row["policy"]["kl"] for row in rows) / 6)
    assert all(row["reference"]["kl"] == 0 for row in rows)
    assert report["identical_responses"] < 6, "the policy's adapter had no effect"
    assert evaluated.metadata["metrics"]["vader_rise"] == report["scorers"]["vader"]["rise"]["mean"]
    assert "tiny" in page
    assert "12.5" in page or "12 s" in page  # the policy's time, from its manifest


def test_rewards_and_kl_are_those_of_the_full_model(bench: Bench) -> None:
    """Scored again without trunk, cache or padding: the whole model on each sequence, one at a time."""
    folder = bench.runs.root / "model"
    tokenizer = load_tokenizer(folder)
    roles = Roles(load_base(folder, Quantization(type="none"), torch.device("cpu")), Lora(**LORA), critic=False)
    roles.load_adapter("policy", bench.runs.root / "policy" / "adapter")
    score, _ = load_score(bench.runs.root / "reward", roles, tokenizer, 2)
    head = load_file(bench.runs.root / "reward" / "head.safetensors")["weight"][0]
    sampled: list[Responses] = []

    def remembering(trunk: Trunk, responses: Responses) -> torch.Tensor:
        sampled.append(responses)
        return score(trunk, responses)

    prompts = Prompts(bench.runs.artifacts.fetch(bench.inputs["prompts"], bench.runs.root / "p"), "heldout", 0, 0)
    ids, mask = prompts.padded(prompts.rows, torch.device("cpu"))
    sampling = Sampling(8, tokenizer.eos_token_id, tokenizer.pad_token_id, temperature=0.7)
    judged = evaluate.Bench(roles, tokenizer, remembering, (0.5, 2.0), sampling, 2).judge("policy", ids, mask, 5)
    responses = sampled[0]
    for row in range(len(ids)):
        whole = responses.ids[row][responses.mask[row]][None]
        length = int(responses.response_mask[row].sum())
        logprobs = {}
        with torch.no_grad():
            for role in ("policy", "reference"):
                roles.activate(role)
                logits = roles.model(input_ids=whole, use_cache=False).logits[0, -length - 1 : -1] / 0.7
                logprobs[role] = logits.log_softmax(-1).gather(-1, whole[0, -length:, None]).sum().item()
            roles.activate("reward")
            proper = whole[:, :-1] if responses.ended[row] else whole
            last = roles.model.get_decoder()(input_ids=proper, use_cache=False).last_hidden_state[0, -1]
        assert judged.kl[row] == pytest.approx(logprobs["policy"] - logprobs["reference"], abs=1e-3)
        assert judged.rewards[row] == pytest.approx((float(head @ last) - 0.5) / 2.0, abs=1e-3)


def test_a_second_run_gives_the_same_content(bench: Bench, evaluated: Manifest, tmp_path: Path) -> None:
    config = bench.config(scorers=SCORERS)
    again = config.model_copy(update={"output": ArtifactRef(kind="evaluation", digest="d" * 64)})
    assert bench.runs.run(again).content == evaluated.content


def test_an_untrained_policy_says_what_the_sft_policy_says(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    weights = load_file(tmp_path / "policy" / "adapter" / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name].zero_()
    save_file(weights, tmp_path / "policy" / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    bench.inputs["policy"] = bench.runs.put("policy", tmp_path / "policy")
    report, _, _ = bench.read(bench.runs.run(bench.config()))
    assert report["identical_responses"] == 6
    assert report["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert report["reward"]["win_rate"]["ties"] == 6
    assert report["scorers"] == {}


def test_a_fitted_scorer_without_labelled_texts_names_the_field(bench: Bench) -> None:
    config = bench.config(scorers=SCORERS)
    inputs = {name: ref for name, ref in config.inputs.items() if name != "data"}
    without = config.model_copy(update={"inputs": inputs, "output": ArtifactRef(kind="evaluation", digest="e" * 64)})
    with pytest.raises(UserError, match=r"evaluate\.scorers\.classifier: .*data\.evaluation"):
        bench.runs.run(without)


def test_one_held_out_prompt_gives_no_interval(bench: Bench) -> None:
    one = pa.table({"prompt": ["a"], "input_ids": [[5]]})
    config = bench.config(samples=4)
    inputs = {**config.inputs, "prompts": bench.runs.put_tables("prompt-data", one, one)}
    with pytest.raises(UserError, match=r"evaluate: 1 held-out prompt .*data\.prompts\.heldOut"):
        bench.runs.run(config.model_copy(update={"inputs": inputs}))


def test_generate_answers_with_and_without_the_adapter(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--store-url", bench.runs.store.url, "--model", str(bench.inputs["model"]), "--prompt", "the film"]
    arguments += ["--prompt", "a", "--tokens", "8", "--seed", "4"]
    both = [*arguments, "--policy", str(bench.inputs["policy"])]
    assert generate.main([*both, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [answer["prompt"] for answer in first] == ["the film", "a"]
    assert first[0]["reference"] != first[0]["policy"]
    assert generate.main([*arguments, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone == [{"prompt": a["prompt"], "reference": a["reference"]} for a in first]
    assert generate.main(both) == 0
    assert "after (PPO)" in capsys.readouterr().out


def test_generate_names_what_is_wrong(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--store-url", bench.runs.store.url, "--prompt", "the film", "--model"]
    assert generate.main([*arguments, "policy"]) == 2
    assert "--model: 'policy'" in capsys.readouterr().err
    assert generate.main([*arguments, f"merged-model/{'f' * 64}"]) == 2
    assert "no such artifact" in capsys.readouterr().err


def test_kl_is_finite_for_greedy_answers(bench: Bench) -> None:
    report, _, _ = bench.read(bench.runs.run(bench.config(temperature=0)))
    assert math.isfinite(report["kl"]["mean"])
