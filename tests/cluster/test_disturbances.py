"""An operator or API server that goes away, and a run that is stopped, change nothing of what it comes to."""

import random
import time

import pytest
from calm import CHAIN_SECONDS, LONGER, again
from kubectl import SOON
from release import STAGES, Release, fresh_spec

pytestmark = pytest.mark.timeout(1800)

LEADS_AGAIN_SECONDS = 20.0  # what is left of the Lease, 15 s, and a start
MAIN_STAGES = ("import-model", "sft", "merge", "reward", "ppo", "evaluate")


def test_the_operator_may_die_at_any_moment(release: Release, expected: dict[str, str]) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    release.apply("killed", fresh_spec("killed", **LONGER))
    kills = 0

    def ended() -> bool:
        nonlocal kills
        if release.status("killed").get("phase") in ("Succeeded", "Failed"):
            return True
        kills += release.kill_operator()
        time.sleep(moments.uniform(2, LEADS_AGAIN_SECONDS + 25))
        return False

    release.until(ended, CHAIN_SECONDS, lambda: release.words("killed"))
    print(f"seed {seed}: the operator was killed {kills} times")
    assert kills >= 3
    assert release.status("killed")["phase"] == "Succeeded", release.words("killed")
    assert release.jobs("killed") == {stage: [1] for stage in STAGES}
    assert release.contents("killed") == expected


def test_the_api_server_may_be_killed_while_stages_run(release: Release, expected: dict[str, str]) -> None:
    again(release, "restarted", "ppo")
    [server] = [
        node["metadata"]["name"] for node in release.objects.list("nodes", "node-role.kubernetes.io/control-plane")
    ]
    for stage in ("ppo", "evaluate"):
        release.running_pod("restarted", stage, CHAIN_SECONDS)
        release.on_node(server, "pkill", "-KILL", "kube-apiserver")
    release.wait("restarted", timeout=CHAIN_SECONDS)
    assert release.jobs("restarted") == {"ppo": [1], "evaluate": [1]}
    assert release.contents("restarted") == expected


def test_suspended_and_deleted_in_every_stage(release: Release, expected: dict[str, str]) -> None:
    spec = fresh_spec("paused", **LONGER)

    def phase() -> str:
        return str(release.status("paused").get("phase"))

    def at_work() -> list[str]:
        pods = release.pods("paused")
        return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]

    def delete() -> None:
        release.kubectl("delete", "rlhfrun", "paused", f"--timeout={SOON:.0f}s")
        release.until(lambda: not release.pods("paused") and not release.jobs("paused"), SOON)

    def start(stage: str) -> None:
        """Apply the run, and wait until the stage runs."""
        while True:
            release.apply("paused", spec)
            release.until(lambda: release.states("paused").get(stage, "Waiting") != "Waiting", CHAIN_SECONDS)
            states = release.states("paused")
            if states[stage] not in ("Reused", "Succeeded"):
                release.running_pod("paused", stage)
                return
            # A process that is just being started hears no SIGTERM: stopped there, it may have come to its end.
            later = MAIN_STAGES[MAIN_STAGES.index(stage) :]
            release.forget("paused", *(name for name in later if states[name] in ("Reused", "Succeeded")))
            delete()

    for stage in MAIN_STAGES:
        start(stage)
        release.patch("paused", {"suspend": True})
        # A stage that ends before it hears of it has ended; if it was the last one, so has the run.
        ended = release.until(
            lambda: (now := phase()) in ("Suspended", "Succeeded") and now, SOON, lambda: release.words("paused")
        )
        assert not at_work()
        release.patch("paused", {"suspend": False})
        if ended == "Suspended":
            release.until(lambda: at_work() or phase() == "Succeeded", SOON, lambda: release.words("paused"))
        delete()
    release.apply("paused", spec)
    release.wait("paused", timeout=CHAIN_SECONDS)
    assert release.contents("paused") == expected


def test_an_upgrade_of_the_chart_in_the_middle_of_a_run(release: Release, expected: dict[str, str]) -> None:
    again(release, "upgraded", "ppo")
    release.running_pod("upgraded", "ppo")
    before = release.operator_pod()
    release.install("operator.workers=3")
    assert release.operator_pod() != before
    release.wait("upgraded", timeout=CHAIN_SECONDS)
    assert release.jobs("upgraded") == {"ppo": [1], "evaluate": [1]}
    assert release.contents("upgraded") == expected
