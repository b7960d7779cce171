"""A run that nothing disturbs, and others that shall come to the same: how a test begins them."""

from typing import Any

from release import Release, tiny_spec

CALM = "calm"
CHAIN_SECONDS = 900.0
LONGER: dict[str, Any] = {
    "sft": {"steps": 60},
    "reward": {"steps": 60},
    "ppo": {"episodes": 128},
}  # time to break things


def undisturbed(release: Release) -> dict[str, Any]:
    """The final status of a run that nothing disturbs."""
    release.apply(CALM, tiny_spec(**LONGER))
    return release.wait(CALM, timeout=CHAIN_SECONDS)


def again(release: Release, name: str, *stages: str) -> None:
    """Apply the run of `undisturbed` under a name of its own, with these stages and the evaluation to make again."""
    release.forget(CALM, *stages, "evaluate")
    release.apply(name, tiny_spec(**LONGER))
