"""Specs of every shape: each field right by itself, the rules that join fields kept or not."""

from typing import Any

from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_api.run import ObjectStore

sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 16, 48, 64])
maybe = st.sampled_from([None, 1, 2, 3, 8, 16, 64])
fractions = st.sampled_from([0, 0.05, 0.5, 1])
rows = st.sampled_from([None, "0%:70%", "70%:100%", "70%:70%", "90%:10%", "50%:101%", "100%:999%"])
sources = st.sampled_from(["hf://datasets/a/b", "hf://a/b", "file:///a.csv", "package://a/b.csv"])
places = {
    "bucket": st.text("ab1.-_A", min_size=1, max_size=7) | st.sampled_from(["rlhf", "10.0.0.1", "my-s3alias"]),
    "prefix": st.text("a/.=-_?#%", max_size=6),
    "endpoint": st.sampled_from(["http://minio:9000", "https://s3.example.com/", "http://[::1]:9000", "http://a.b"]),
    "credentialsSecret": st.just("mine"),
}
kl = st.sampled_from([None, 1.0, 199.5, 200.0, 300.0])


@st.composite
def tables(draw: st.DrawFn, columns: tuple[str, ...] = ()) -> dict[str, Any]:
    table = {"source": draw(sources), "rows": draw(rows), "heldOut": draw(fractions)}
    table |= {"revision": draw(st.sampled_from([None, "main"])), "split": draw(st.sampled_from(["train", "test"]))}
    chosen = draw(st.lists(st.sampled_from(columns), unique=True)) if columns else []
    return table | dict.fromkeys(chosen, "x")


@st.composite
def stores(draw: st.DrawFn) -> dict[str, str]:
    """Places for artifacts, of which each field is right by itself."""
    return {
        name: value for name, value in draw(st.fixed_dictionaries({}, optional=places)).items() if _right(name, value)
    }


def _right(field: str, value: str) -> bool:
    try:
        ObjectStore.model_validate({field: value})
    except ValidationError:
        return False
    return True


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Specs whose every field is right by itself."""
    pairs = ("chosenColumn", "rejectedColumn", "textColumn", "labelColumn", "chosenLabel")
    scorer = st.fixed_dictionaries(
        {"name": st.sampled_from("abc"), "function": st.sampled_from([None, "m:f"]), "fitted": st.booleans()}
    )
    classifier = {"source": draw(sources), "label": "x", "revision": draw(st.sampled_from([None, "main"]))}
    return {
        "model": {"source": draw(sources), "revision": draw(st.sampled_from([None, "main"]))},
        "data": {
            "sft": draw(st.none() | tables()),
            "preferences": draw(st.none() | tables(pairs)),
            "prompts": draw(tables()),
            "evaluation": draw(st.none() | tables()),
        },
        "sft": {
            "steps": draw(sizes),
            "warmupSteps": draw(sizes),
            "batchSize": draw(sizes),
            "microBatchSize": draw(sizes),
        },
        "reward": {
            "batchSize": draw(sizes),
            "microBatchSize": draw(sizes),
            "classifier": draw(st.sampled_from([None, classifier])),
            "function": draw(st.sampled_from([None, "m:f"])),
        },
        "ppo": {
            "batchSize": draw(sizes),
            "miniBatchSize": draw(maybe),
            "microBatchSize": draw(sizes),
            "rolloutBatchSize": draw(maybe),
            "maxKl": draw(kl),
            "klCoefficient": draw(st.sampled_from([0, 0.1])),
            "adaptiveKl": draw(st.none() | st.fixed_dictionaries({"target": kl.filter(bool)})),
        },
        "evaluate": {"scorers": draw(st.lists(scorer, max_size=3))},
        "gpu": {"count": draw(st.sampled_from([0, 1, 2, 3, 4, 8, 9]))},
        "placement": {"stagePodTemplates": draw(st.sampled_from([{}, {"ppo": {}}, {"dpo": {}}]))},
        "objectStore": draw(stores()),
        "forkFrom": draw(st.sampled_from([None, {"run": "a", "stage": "sft"}, {"run": "a", "stage": "reward"}])),
    }
