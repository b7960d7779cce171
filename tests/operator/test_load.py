"""Files that are no run, and what YAML lets slip by."""

from pathlib import Path

import pytest

from rlhf_api.errors import UserError
from rlhf_operator.load import load_run

RUN = """
apiVersion: rlhf.dev/v1alpha1
kind: RLHFRun
metadata: {name: reviews}
spec:
  model: {source: "hf://owner/model"}
  data:
    prompts: {source: "file:///prompts.csv"}
  reward: {function: "scorers:length"}
"""


def load(tmp_path: Path, text: str | bytes) -> str:
    """What load_run says of a file with this text."""
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load_run(file)
    return str(caught.value).replace(str(tmp_path), "")


def test_a_run_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"# a comment\n---{RUN}  ppo: {{learningRate: 1e-3, klCoefficient: 5E-2}}\n")
    spec = load_run(file).spec
    assert (spec.ppo.learning_rate, spec.ppo.kl_coefficient) == (1e-3, 0.05)


def test_json_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(
        '{"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFRun", "metadata": {"name": "a"}, "spec": {"model": '
        '{"source": "file:///m"}, "data": {"prompts": {"source": "file:///p.csv"}}, "reward": {"function": "a:b"}}}'
    )
    assert load_run(file).metadata.name == "a"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: there is no such file"):
        load_run(tmp_path / "none.yaml")


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: .*directory"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "/run.yaml: holds 0 documents; write one RLHFRun"),
        ("# nothing\n", "/run.yaml: holds 0 documents; write one RLHFRun"),
        (f"{RUN}---{RUN}", "/run.yaml: holds 2 documents; write one RLHFRun"),
        ("spec: [", "/run.yaml: is no valid YAML: "),
        ("spec: {a: *b}", "/run.yaml: is no valid YAML: "),
        ("spec:\n\ta: 1", "/run.yaml: is no valid YAML: "),
        ("!!python/object:os.system {}", "/run.yaml: is no valid YAML: "),
        (b"spec: \xff", "/run.yaml: cannot be read: "),
        (RUN + "  ppo: {epochs: 2, epochs: 3}\n", "/run.yaml: is no valid YAML: key 'epochs' is given twice"),
        (RUN + "  reward: {}\n", "/run.yaml: is no valid YAML: key 'reward' is given twice"),
        (RUN + "  ? {a: 1}\n  : 2\n", "/run.yaml: is no valid YAML: "),
        ("just text", "/run.yaml is not a valid RLHFRun:\nthe document is text; write a mapping"),
        (RUN + "  sft: {step: 3}\n", "/run.yaml is not a valid RLHFRun:\nspec.sft.step: unknown field; did you mean"),
        (RUN + "  1: 2\n", "/run.yaml is not a valid RLHFRun:\nspec"),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, text: str | bytes, says: str) -> None:
    assert load(tmp_path, text).startswith(says)


def test_a_date_is_text(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace('source: "hf://owner/model"', 'source: "hf://owner/model", revision: 2026-11-22'))
    assert load_run(file).spec.model.revision == "2026-11-22"
