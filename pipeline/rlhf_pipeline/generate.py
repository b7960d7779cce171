"""Try a policy: `python -m rlhf_pipeline.generate --store-url URL --model kind/digest --policy kind/digest --prompt …`.

With a policy, each prompt is answered twice with the same random numbers: by the model alone (the SFT policy) and by
the policy. Without one, by the model alone.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_api.errors import RLHFError, UserError
from rlhf_api.names import EXIT_CODES, EXIT_OK
from rlhf_api.run import Lora, Quantization
from rlhf_api.stage import ArtifactRef, StoreConfig
from rlhf_store.artifacts import Artifacts, open_artifacts

SIDES = {"reference": "before (SFT)", "policy": "after (PPO)"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answers. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        artifacts = open_artifacts(StoreConfig(url=options.store_url, endpoint=options.endpoint, region=options.region))
        with tempfile.TemporaryDirectory(prefix="rlhf-generate-") as work:
            answers = generate(
                artifacts,
                _ref(options.model, "--model"),
                _ref(options.policy, "--policy") if options.policy else None,
                options.prompt,
                Path(work),
                tokens=options.tokens,
                temperature=options.temperature,
                seed=options.seed,
            )
    except RLHFError as error:
        print(str(error), file=sys.stderr)
        return EXIT_CODES[error.failure]
    if options.json:
        print(json.dumps(answers, ensure_ascii=False))
    else:
        print(_readable(answers))
    return EXIT_OK


def generate(
    artifacts: Artifacts,
    model: ArtifactRef,
    policy: ArtifactRef | None,
    prompts: Sequence[str],
    work: Path,
    *,
    tokens: int,
    temperature: float,
    seed: int,
) -> list[dict[str, str]]:
    """For each prompt {prompt, reference} and, with a policy, its answer as `policy`.

    The base is quantised as the stage that made the policy, or the merged model, held it. On a GPU if there is one.
    Raises UserError for an artifact that is not there or an empty prompt.
    """
    import torch
    from transformers.utils import logging

    from rlhf_pipeline.models import load_base, load_tokenizer
    from rlhf_pipeline.roles import Role, Roles
    from rlhf_pipeline.rollout import Sampling, rollout
    from rlhf_pipeline.scoring import texts_of

    logging.disable_progress_bar()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    settings = artifacts.need(policy or model).metadata.get("config", {}).get("settings", {})
    # An imported model that no stage has quantised says nothing about it.
    quantization = Quantization.model_validate(settings.get("quantization", {"type": "none"}))
    folder = artifacts.fetch(model, work / "model")
    tokenizer = load_tokenizer(folder)
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not all(rows):
        raise UserError(f"--prompt: {prompts[rows.index([])]!r} has no tokens; give some text to continue")
    base: Any = load_base(folder, quantization, device)
    roles: list[Role] = ["reference"]
    activate: Any = None
    if policy:
        adapters = Roles(base, Lora.model_validate(settings["lora"]), critic=False)
        adapters.load_adapter("policy", artifacts.fetch(policy, work / "policy", ["adapter/*"]) / "adapter")
        roles, activate = ["reference", "policy"], adapters.activate

    longest = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    sampling = Sampling(tokens, tokenizer.eos_token_id, pad, temperature)
    answers: list[dict[str, str]] = [{"prompt": prompt} for prompt in prompts]
    for role in roles:
        if activate:
            activate(role)
        torch.manual_seed(seed)
        for answer, text in zip(answers, texts_of(tokenizer, rollout(base, ids, mask, sampling))[1], strict=True):
            answer[role] = text
    return answers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rlhf_pipeline.generate", description=__doc__)
    parser.add_argument("--store-url", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument("--endpoint", help="S3 endpoint URL")
    parser.add_argument("--region", help="of the bucket")
    parser.add_argument("--model", required=True, help="kind/digest of the base: the merged model")
    parser.add_argument("--policy", help="kind/digest of the policy; without it, the model alone answers")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be repeated")
    parser.add_argument("--tokens", type=_positive, default=64, help="tokens of an answer, at most")
    parser.add_argument("--temperature", type=_not_negative, default=1.0, help="0: greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON list of {prompt, reference, policy}")
    return parser


def _ref(text: str, option: str) -> ArtifactRef:
    try:
        return ArtifactRef.parse(text)
    except ValueError as error:
        raise UserError(f"{option}: {text!r} is no artifact's address; it is kind/digest") from error


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _readable(answers: list[dict[str, str]]) -> str:
    lines: list[str] = []
    for answer in answers:
        lines.append(answer["prompt"])
        lines += [f"  {SIDES[side]:<13} {answer[side].strip()}" for side in SIDES if side in answer]
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
