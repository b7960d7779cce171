"""Whatever spec the API server may let through, the operator looks at it, says what it makes of it, and goes on."""

import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from any_spec import specs, stores
from hypothesis import given, settings
from hypothesis import strategies as st
from minio.helpers import check_bucket_name, check_object_name
from small_world import World

from rlhf_api.errors import FailureClass
from rlhf_api.names import ENV_ACCESS_KEY, ENV_SECRET_KEY
from rlhf_api.rules import problems
from rlhf_api.run import ObjectStore, RunSpec
from rlhf_operator.operator_settings import OperatorSettings
from rlhf_store.s3_objects import S3Objects

ENDS: list[FailureClass | None] = [None, None, None, "user", "gate", "outOfMemory", "infrastructure", "bug"]


@given(store=stores())
@settings(max_examples=300)
def test_the_client_takes_every_store_that_a_spec_may_name(store: dict[str, str]) -> None:
    spec = {"model": {"source": "hf://a/b"}, "data": {"prompts": {"source": "file:///a.csv"}}, "objectStore": store}
    if any(problem.path.startswith("objectStore") for problem in problems(RunSpec.model_validate(spec))):
        return
    place = OperatorSettings(image="pipeline:1", prefix="runs").store_of(ObjectStore.model_validate(store))
    objects = S3Objects.from_environment(place, {ENV_ACCESS_KEY: "a", ENV_SECRET_KEY: "b"})
    check_bucket_name(urlsplit(place.url).netloc)
    check_object_name(f"{objects.url.removeprefix('s3://').partition('/')[2]}key")
    assert objects.url.rstrip("/") == place.url


@given(spec=specs(), ends=st.lists(st.sampled_from(ENDS), max_size=12))
@settings(max_examples=60)
def test_no_spec_stops_the_operator(spec: dict[str, Any], ends: list[FailureClass | None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.cluster.apply(world.document() | {"spec": spec})
        for end in ends:
            world.settle()
            world.cluster.start_pods()
            for job in world.cluster.active():
                stage = job["metadata"]["labels"]["rlhf.dev/stage"]
                if end is None:
                    world.succeed(stage)
                else:
                    world.fail(stage, end)
            world.cluster.now += 400
        world.settle()
        broken = problems(RunSpec.model_validate(spec))
        status = world.status()
        assert status.conditions
        if broken:
            assert status.phase == "Failed"
            assert not world.cluster.jobs_
            [valid] = [each for each in status.conditions if each.type == "Valid"]
            assert all(str(problem) in valid.message for problem in broken)
