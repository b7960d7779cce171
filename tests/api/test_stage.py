"""Digests that address artifacts, and the result that must fit a termination message."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_api.canonical import canonical_json, sha256_of
from rlhf_api.errors import RETRIED, RLHFError, UserError
from rlhf_api.names import EXIT_CODES
from rlhf_api.run import PPO, Lora, Model, Quantization
from rlhf_api.stage import (
    MAX_RESULT_BYTES,
    PROGRAM_VERSION,
    ArtifactRef,
    RunIdentity,
    StageConfig,
    StageFailure,
    StageResult,
    StageSettings,
    StoreConfig,
    stage_digest,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
REF = ArtifactRef(kind="policy", digest="0" * 64)


@given(document=json_values)
def test_canonical_json_is_json_of_the_same_document(document: Any) -> None:
    data = canonical_json(document)
    assert json.loads(data) == document
    assert canonical_json(json.loads(data)) == data
    assert b"\n" not in data


@given(document=st.dictionaries(st.text(), st.integers()))
def test_the_order_of_keys_changes_neither_bytes_nor_digest(document: dict[str, int]) -> None:
    backwards = dict(reversed(document.items()))
    assert canonical_json(backwards) == canonical_json(document)
    assert sha256_of(backwards) == sha256_of(document)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": value})


def test_canonical_json_of_text_is_utf8() -> None:
    assert canonical_json({"b": "ü", "a": [1, 2.5, None, True]}) == '{"a":[1,2.5,null,true],"b":"ü"}'.encode()


# A changed digest strands every artifact made before. If the change is meant, raise PROGRAM_VERSION and write down
# the new digest here.
GOLDEN = {
    "import-model": "c5b70e362344dc80bceb380322ad42f0ed8abc09d207965e2922363d716aeea3",
    "ppo": "2a26daea33f4d865864b2362629dde9878a7ccba77096852ef561cc6a556b091",
}


def test_digests_are_those_of_earlier_releases() -> None:
    imported = stage_digest("import-model", StageSettings(model=Model(source="hf://a/b", revision="c0ffee")), {})
    settings = StageSettings(quantization=Quantization(), lora=Lora(), ppo=PPO(), seed=7)
    inputs = {"model": ArtifactRef(kind="merged-model", digest="1" * 64)}
    assert {"import-model": imported, "ppo": stage_digest("ppo", settings, inputs)} == GOLDEN


def test_a_digest_depends_on_program_version_settings_and_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, inputs = StageSettings(ppo=PPO(), lora=Lora()), {"model": REF}
    digests = [
        stage_digest("ppo", settings, inputs),
        stage_digest("evaluate", settings, inputs),
        stage_digest("ppo", settings.model_copy(update={"seed": 1}), inputs),
        stage_digest("ppo", settings.model_copy(update={"ppo": PPO(epochs=5)}), inputs),
        stage_digest("ppo", settings, {}),
        stage_digest("ppo", settings, {"policy": REF}),
        stage_digest("ppo", settings, {"model": REF.model_copy(update={"digest": "1" * 64})}),
    ]
    monkeypatch.setitem(PROGRAM_VERSION, "ppo", PROGRAM_VERSION["ppo"] + 1)
    digests.append(stage_digest("ppo", settings, inputs))
    assert len(set(digests)) == len(digests)


def test_a_default_written_out_gives_the_same_digest() -> None:
    written = PPO.model_validate(PPO().model_dump(by_alias=True))
    assert stage_digest("ppo", StageSettings(ppo=written), {}) == stage_digest("ppo", StageSettings(ppo=PPO()), {})


def test_a_stage_config_survives_the_round_trip() -> None:
    config = StageConfig(
        run=RunIdentity(name="reviews"),
        stage="ppo",
        program="ppo",
        settings=StageSettings(ppo=PPO(gae_lambda=0.9, missing_eos_penalty=None), lora=Lora(layers="top:2")),
        inputs={"model": REF},
        output=REF,
        store=StoreConfig(url="s3://bucket/prefix", endpoint="http://127.0.0.1:9000"),
    )
    assert StageConfig.model_validate_json(config.model_dump_json(by_alias=True)) == config
    # Without nulls too: that missingEosPenalty is null means something, and must not become the default again.
    assert StageConfig.model_validate_json(config.model_dump_json(by_alias=True, exclude_none=True)) == config
    assert "revision" not in Model(source="hf://a/b").model_dump(exclude_none=True)


names = st.text(max_size=80)
results = st.builds(
    StageResult,
    stage=st.sampled_from(["sft", "import-preferences"]),
    artifact=st.none() | st.just(REF),
    metrics=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=100),
    failure=st.none()
    | st.builds(
        StageFailure,
        failure=st.sampled_from(["user", "bug"]),
        message=st.text() | st.text(min_size=1).map(lambda part: part * 3000),
        checkpoint=st.none() | st.just("artifacts/policy/" + "0" * 64 + "/1/checkpoints/00000020/"),
    ),
    seconds=st.floats(0, 1e9),
)


@given(result=results)
def test_a_result_fits_a_termination_message_and_keeps_what_matters(result: StageResult) -> None:
    data = result.to_bytes()
    assert len(data) <= MAX_RESULT_BYTES
    back = StageResult.model_validate_json(data)
    assert (back.stage, back.artifact, back.seconds) == (result.stage, result.artifact, result.seconds)
    assert (back.failure is None) == (result.failure is None)
    if result.failure and back.failure:
        assert (back.failure.failure, back.failure.checkpoint) == (result.failure.failure, result.failure.checkpoint)
        assert (
            back.failure.message.removesuffix(" …")
            == result.failure.message[: len(back.failure.message)].removesuffix(" …")[
                : len(back.failure.message.removesuffix(" …"))
            ]
        )


def test_a_result_that_fits_is_whole() -> None:
    result = StageResult(stage="sft", artifact=REF, metrics={"loss": 1.5}, seconds=3.0)
    assert StageResult.model_validate_json(result.to_bytes()) == result


def test_every_failure_has_an_exit_code_of_its_own() -> None:
    kinds = {error.failure for error in [RLHFError, *RLHFError.__subclasses__()]}
    assert kinds == set(EXIT_CODES)
    assert len({*EXIT_CODES.values(), 0, 130}) == len(EXIT_CODES) + 2
    assert kinds > RETRIED
    assert UserError.failure not in RETRIED
