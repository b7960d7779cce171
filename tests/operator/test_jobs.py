"""The Job of a stage: the whole document, as files under golden/, and what a run may change of it.

`REWRITE_GOLDEN=1 pytest tests/operator/test_jobs.py` writes the files anew; read the diff.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_api.errors import UserError
from rlhf_api.names import ENV_STAGE_CONFIG, LABEL_QUEUE, LABEL_STAGE, STAGE_NAMES, job_name
from rlhf_api.run import ObjectStore, RLHFRun
from rlhf_api.stage import StageConfig
from rlhf_operator.jobs import stage_job
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_operator.pod_template import overlaid
from rlhf_operator.stages import chain

GOLDEN = Path(__file__).with_name("golden")
PLAIN = OperatorSettings(image="rlhf-pipeline:1", endpoint="http://minio:9000")
CHART = OperatorSettings(
    image="registry.example/rlhf-pipeline@sha256:1",
    image_pull_policy="Always",
    image_pull_secrets=("pull",),
    prefix="team",
    endpoint="https://store.example",
    region="eu-1",
    resources={"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
    gpu_resources={"requests": {"memory": "24Gi"}, "limits": {"memory": "32Gi"}},
    ephemeral_storage="100Gi",
    shared_memory="2Gi",
    priority_class="training",
)
PLACEMENT = {
    "nodeSelector": {"rlhf.dev/gpu-memory": "24Gi"},
    "tolerations": [{"key": "spot", "operator": "Exists"}],
    "podTemplate": {
        "metadata": {"labels": {"team": "a", "rlhf.dev/stage": "forged"}, "annotations": {"note": "mine"}},
        "spec": {
            "runtimeClassName": "nvidia",
            "priorityClassName": "urgent",
            "restartPolicy": "Always",
            "tolerations": [{"key": "more", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "securityContext": {"runAsUser": 1000},
            "containers": [
                {
                    "name": "stage",
                    "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
                    "resources": {"limits": {"cpu": "8"}},
                    "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
                },
                {"name": "sidecar", "image": "sidecar:1"},
            ],
            "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
                {"name": "shared-memory", "emptyDir": {"sizeLimit": "8Gi"}},
            ],
        },
    },
}


def resource(name: str = "run", labels: dict[str, str] | None = None, **spec: Any) -> RLHFRun:
    metadata = {"name": name, "namespace": "team-a", "uid": "uid-1", "labels": labels or {}}
    short = {
        "model": {"source": "hf://owner/model"},
        "data": {"prompts": {"source": "hf://datasets/owner/prompts"}},
        "reward": {"function": "module:callable"},
    }
    return RLHFRun.model_validate({"metadata": metadata, "spec": {**short, **spec}})


def job(stage: str, run: RLHFRun, settings: OperatorSettings = PLAIN, number: int = 1) -> dict[str, Any]:
    link = next(link for link in chain(run, {}) if link.name == stage)
    return stage_job(run, link, number, settings, asked_at=1000.0)


def pod(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["template"]["spec"]
    return found


def environment(document: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in pod(document)["containers"][0]["env"]}


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("import-plain", lambda: job("import-model", resource())),
        ("ppo-plain", lambda: job("ppo", resource(), number=3)),
        ("ppo-everything", lambda: job("ppo", resource(placement=PLACEMENT, labels={LABEL_QUEUE: "gpus"}), CHART)),
        ("ppo-cpu", lambda: job("ppo", resource(gpu={"count": 0}), CHART)),
    ],
)
def test_the_whole_job(name: str, document: Any) -> None:
    file = GOLDEN / f"{name}.yaml"
    text = yaml.safe_dump(document(), sort_keys=True, width=120)
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text


def test_a_stage_can_read_its_config() -> None:
    run = resource()
    config = StageConfig.model_validate_json(environment(job("ppo", run, CHART))[ENV_STAGE_CONFIG])
    link = next(link for link in chain(run, {}) if link.name == "ppo")
    assert (config.output, config.inputs, config.settings) == (link.output, link.inputs, link.settings)
    assert (config.store.url, config.store.endpoint, config.store.region) == (
        "s3://rlhf/team", "https://store.example", "eu-1",
    )  # fmt: skip
    assert config.run.uid == "uid-1"


def test_two_runs_of_one_name_write_to_folders_of_their_own() -> None:
    def writer(uid: str) -> str:
        run = resource()
        run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"uid": uid})})
        return StageConfig.model_validate_json(environment(job("ppo", run, CHART))[ENV_STAGE_CONFIG]).attempt

    uids = ("0d4d9b1e-8f54-4c7e-a1d1-1c2f3b4a5d6e", "7e1c3b7a-2f54-4c7e-a1d1-1c2f3b4a5d6e")
    assert len({writer(uid) for uid in uids}) == 2
    assert writer(uids[0]) == writer(uids[0])


def test_one_stage_may_have_a_patch_of_its_own_over_that_of_all() -> None:
    placement = {
        "podTemplate": {"spec": {"priorityClassName": "low", "runtimeClassName": "nvidia"}},
        "stagePodTemplates": {"ppo": {"spec": {"priorityClassName": "high"}}},
    }
    found = {stage: job(stage, resource(placement=placement))["spec"]["template"]["spec"] for stage in ("sft", "ppo")}
    assert {stage: pod["priorityClassName"] for stage, pod in found.items()} == {"sft": "low", "ppo": "high"}
    assert {pod["runtimeClassName"] for pod in found.values()} == {"nvidia"}
    with pytest.raises(UserError, match=r"spec.placement.stagePodTemplates.ppo.containers: unknown field"):
        job("ppo", resource(placement={"stagePodTemplates": {"ppo": {"containers": []}}}))


def test_a_config_with_dollars_reaches_the_stage_as_it_is() -> None:
    run = resource(reward={"function": "module:callable"}, data={"prompts": {"source": "s3://b/$(HOME)/$$x"}})
    text = environment(job("import-prompts", run))[ENV_STAGE_CONFIG]
    assert "$$(HOME)/$$$$x" in text
    config = StageConfig.model_validate_json(text.replace("$$", "$"))  # what the kubelet makes of it
    assert config.settings.prompt_data is not None
    assert config.settings.prompt_data.source == "s3://b/$(HOME)/$$x"


def test_no_credential_is_written_into_the_job() -> None:
    values = environment(job("ppo", resource(objectStore={"credentialsSecret": "mine"})))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        assert values[name]["secretKeyRef"]["name"] == "mine"
        assert values[name]["secretKeyRef"]["key"] == name


@pytest.mark.parametrize("stage", ["import-model", "ppo"])
@pytest.mark.parametrize("settings", [PLAIN, CHART])
def test_the_pod_keeps_to_the_restricted_profile(stage: str, settings: OperatorSettings) -> None:
    found = pod(job(stage, resource(), settings))
    assert found["securityContext"]["runAsNonRoot"] is True
    assert found["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert found["automountServiceAccountToken"] is False
    for container in found["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert all("emptyDir" in volume for volume in found["volumes"])


def test_a_stage_has_as_many_threads_as_cpus_that_it_may_use() -> None:
    """What torch counts are the CPUs of the node."""

    def threads(settings: OperatorSettings, *variables: Any) -> Any:
        placement = {"podTemplate": {"spec": {"containers": [{"name": "stage", "env": list(variables)}]}}}
        return environment(job("ppo", resource(placement=placement), settings)).get("OMP_NUM_THREADS")

    limited = replace(PLAIN, resources={"limits": {"cpu": "1500m"}})
    assert threads(PLAIN) is None
    assert threads(limited) == {"resourceFieldRef": {"resource": "limits.cpu"}}
    assert threads(limited, {"name": "OMP_NUM_THREADS", "value": "7"}) == "7"


def test_several_gpus_are_for_the_stages_that_share_a_batch() -> None:
    trained, given = resource(gpu={"count": 4}, reward={}), resource(gpu={"count": 4})
    shared = {"sft": 4, "merge": 1, "reward": 4, "ppo": 4, "evaluate": 1}
    for run, stages in ((trained, shared), (given, {"reward": 1, "ppo": 4})):
        for stage, gpus in stages.items():
            document = job(stage, run, CHART)
            assert pod(document)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(gpus), stage
            assert StageConfig.model_validate_json(environment(document)[ENV_STAGE_CONFIG]).gpu.count == gpus, stage


def test_a_gpu_is_asked_for_by_the_stages_that_train_alone() -> None:
    limits = {
        stage: pod(job(stage, resource(), CHART))["containers"][0]["resources"]["limits"]
        for stage in ("import-model", "reward", "ppo", "evaluate")
    }
    assert {stage for stage, found in limits.items() if found.get("nvidia.com/gpu") == "1"} == {
        "reward", "ppo", "evaluate",
    }  # fmt: skip
    assert environment(job("import-model", resource()))["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment(job("ppo", resource()))


def test_what_the_operator_selects_by_cannot_be_forged() -> None:
    made = job("ppo", resource(placement=PLACEMENT))
    assert made["spec"]["template"]["metadata"]["labels"][LABEL_STAGE] == "ppo"
    assert pod(made)["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ({"containers": []}, "spec.placement.podTemplate.containers: unknown field"),
        ({"spec": None}, "spec.placement.podTemplate.spec: is null"),
        ({"spec": "x"}, "spec.placement.podTemplate.spec: 'x' should be a mapping"),
        ({"spec": {"containers": "x"}}, "podTemplate.spec.containers: 'x' should be a list"),
        ({"spec": {"containers": [{"image": "x"}]}}, r"podTemplate.spec.containers\[0\]: has no name"),
        ({"spec": {"containers": ["x"]}}, r"podTemplate.spec.containers\[0\]: 'x' should be a mapping"),
        ({"spec": {"containers": None}}, "podTemplate.spec.containers: has no stage"),
        (
            {"spec": {"containers": [{"name": "stage", "env": [{"value": "x"}]}]}},
            r"podTemplate.spec.containers\[stage\].env\[0\]: has no name",
        ),
        ({"spec": {"volumes": [{"emptyDir": {}}]}}, r"podTemplate.spec.volumes\[0\]: has no name"),
        ({"metadata": {"labels": ["x"]}}, r"podTemplate.metadata.labels: \['x'\] should be a mapping"),
    ],
    ids=str,
)
def test_a_template_that_makes_no_pod_names_the_field(template: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        job("ppo", resource(placement={"podTemplate": template}))


def test_an_overlay_merges_by_name_removes_with_null_and_leaves_its_base_alone() -> None:
    base = {"env": [{"name": "a", "value": "1"}, {"name": "b", "value": "2"}], "args": ["x"], "keep": {"in": 1}}
    overlay = {"env": [{"name": "b", "value": "3"}, {"name": "c", "value": "4"}], "args": ["y"], "keep": {"in": None}}
    assert overlaid(base, overlay, "here") == {
        "env": [{"name": "a", "value": "1"}, {"name": "b", "value": "3"}, {"name": "c", "value": "4"}],
        "args": ["y"],
        "keep": {},
    }
    assert base["env"] == [{"name": "a", "value": "1"}, {"name": "b", "value": "2"}]


@pytest.mark.parametrize(("run", "other"), [("x", "x-import"), ("x-import-sft-1", "x"), ("x--import", "x")])
def test_a_run_whose_name_ends_like_a_stage_shares_no_job(run: str, other: str) -> None:
    names = [job_name(name, stage, n) for name in (run, other) for stage in STAGE_NAMES for n in (1, 11)]
    assert len(set(names)) == len(names)


def test_names_of_jobs_are_short_differ_and_stay_the_same() -> None:
    long = "r" * 52
    names = {job_name(long, stage, number) for stage in ("import-preferences", "ppo") for number in (1, 2, 10)}
    assert len(names) == 6
    assert all(len(name) <= 63 and name.startswith("rrr") for name in names)
    assert job_name("run", "ppo", 2) == "run--ppo-2"
    assert job_name(long, "import-preferences", 2) == job_name(long, "import-preferences", 2)


@pytest.mark.parametrize(
    ("asked", "url", "can_ask"),
    [
        ({}, "s3://rlhf/team", True),
        ({"bucket": "rlhf"}, "s3://rlhf/team", True),
        ({"prefix": "team/"}, "s3://rlhf/team", True),
        ({"prefix": "team/mine/"}, "s3://rlhf/team/mine", True),
        ({"prefix": "mine/"}, "s3://rlhf/mine", False),
        ({"prefix": "teammates"}, "s3://rlhf/teammates", False),
        ({"prefix": ""}, "s3://rlhf", False),
        ({"bucket": "other"}, "s3://other", False),
        ({"bucket": "other", "prefix": "team"}, "s3://other/team", False),
        ({"credentialsSecret": "mine"}, "s3://rlhf/team", False),
        ({"endpoint": "http://else"}, "s3://rlhf/team", False),
    ],
    ids=str,
)
def test_the_store_of_a_run(asked: dict[str, str], url: str, can_ask: bool) -> None:
    wanted = ObjectStore.model_validate(asked)
    assert CHART.store_of(wanted).url == url
    assert CHART.can_ask(wanted) is can_ask


def test_settings_come_from_the_environment() -> None:
    variables = {
        "IMAGE": "i", "STORE_ENDPOINT": "http://m", "STORE_PREFIX": "/p/", "STAGE_RESOURCES": '{"limits": {"cpu": 1}}',
        "IMAGE_PULL_SECRETS": '["a"]', "GRACE_SECONDS": "30", "WATCH_NAMESPACE": "a,b",
    }  # fmt: skip
    found = OperatorSettings.from_environment({f"RLHF_OPERATOR_{name}": value for name, value in variables.items()})
    assert found == OperatorSettings(
        image="i", endpoint="http://m", prefix="p", resources={"limits": {"cpu": 1}}, image_pull_secrets=("a",),
        grace_seconds=30, watch_namespaces=("a", "b"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("IMAGE", "", "RLHF_OPERATOR_IMAGE: is not set"),
        ("GRACE_SECONDS", "soon", "RLHF_OPERATOR_GRACE_SECONDS: 'soon' is no whole number"),
        ("SHARED_MEMORY", "much", "RLHF_OPERATOR_SHARED_MEMORY: 'much' is no quantity"),
        ("STAGE_RESOURCES", "[1]", "RLHF_OPERATOR_STAGE_RESOURCES: '\\[1\\]' should be a JSON object"),
        ("STAGE_RESOURCES", "{", "is no JSON"),
        ("IMAGE_PULL_POLICY", "Sometimes", "is none of IfNotPresent, Always, Never"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        OperatorSettings.from_environment({"RLHF_OPERATOR_IMAGE": "i", f"RLHF_OPERATOR_{name}": value})
