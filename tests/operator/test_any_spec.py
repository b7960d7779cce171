"""Whatever spec the API server may let through, the operator looks at it, says what it makes of it, and goes on."""

import tempfile
from pathlib import Path
from typing import Any

from any_spec import specs
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import World

from rlhf_api.errors import FailureClass
from rlhf_api.rules import problems
from rlhf_api.run import RunSpec

ENDS: list[FailureClass | None] = [None, None, None, "user", "gate", "outOfMemory", "infrastructure", "bug"]


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
