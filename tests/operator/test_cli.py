"""The command `rlhf`: what it prints where, and how it exits."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_api.errors import UserError
from rlhf_api.names import EXIT_CODES
from rlhf_operator.artifacts_command import Place, collect_garbage, list_artifacts, verify_artifacts
from rlhf_operator.cli import IN_CLUSTERS
from rlhf_operator.generate_command import generate_from
from rlhf_operator.logs_command import show_log
from rlhf_operator.open_run import opened
from rlhf_operator.plan_command import plan_file, validate_file
from rlhf_operator.run_command import exit_code, run_file
from rlhf_operator.status_command import copy_report, show_run, show_runs

if TYPE_CHECKING:
    from conftest import Bench  # type: ignore[import-not-found]

SHORT = ["import-model", "import-prompts", "reward", "ppo", "evaluate"]
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
    "intermediate_size": 24576, "vocab_size": 50432, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
RLHF = Path(sys.executable).with_name("rlhf")
REWARD = {
    "reference": {"mean": 0.1, "low": 0.0, "high": 0.2},
    "policy": {"mean": 0.6, "low": 0.5, "high": 0.7},
    "rise": {"mean": 0.5, "low": 0.4, "high": 0.6},
    "win_rate": {"share": 0.75, "low": 0.6, "high": 0.9},
}


@pytest.fixture(autouse=True)
def _in_the_folder(bench: "Bench", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bench.folder)


def rlhf(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([RLHF, *arguments], text=True, capture_output=True, timeout=60, check=False)


def finish(bench: "Bench", **spec: Any) -> None:
    """A finished run whose artifacts were all there already."""
    bench.have(*SHORT, **spec)
    bench.run(**spec)


def report(name: str, out: Path) -> None:
    with opened(name, None) as run:
        copy_report(run, out)


def generate(name: str, *arguments: Any, **others: Any) -> int:
    with opened(name, None) as run:
        return generate_from(run, *arguments, **others)


def test_help_names_every_command() -> None:
    done = rlhf("--help")
    assert done.returncode == 0
    for command in (*IN_CLUSTERS, "validate", "plan", "artifacts"):
        assert command in done.stdout


def test_the_command_starts_without_its_heavy_parts() -> None:
    code = "import rlhf_operator.cli, sys; print({'pydantic', 'torch', 'minio', 'rlhf_api.run'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nope"], "run 'nope' is not in"),
        (["artifacts", "ls", "polizy"], "kind 'polizy': there is no such kind; use one of model,"),
        (["artifacts", "ls", "--store", "s3://"], "--store s3://: no store; use"),
        (["artifacts", "ls", "--endpoint", "http://there"], "add --store s3://bucket/prefix"),
        (["suspend", "nope"], "suspended with Ctrl-C; for a run in a cluster add --cluster"),
        (["resume", "nope"], "for a run in a cluster add --cluster"),
        (["logs"], "no run began in this folder"),
        (["logs", "nope"], "run 'nope' is not in"),
        (["status", "--kubeconfig", "nowhere"], "--kubeconfig nowhere: there is no such file"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    done = rlhf(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rlhf: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    done = rlhf("report", "nope", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "UserError" in done.stderr


def test_validate_lists_the_stages(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_file(bench.write(), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "name": "tiny", "stages": SHORT}


def test_validate_prints_every_problem_as_json(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    file = bench.write(ppo={"batchSize": 8, "microBatchSize": 3}, gpu={"count": 9})
    assert validate_file(file, as_json=True) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["valid"]
    assert [line.split(":")[0] for line in found["problems"] if line.startswith("spec.")] == [
        "spec.ppo.microBatchSize",
        "spec.gpu.count",
    ]


def test_an_unknown_field_is_named_with_a_suggestion(bench: "Bench") -> None:
    done = rlhf("validate", str(bench.write(ppo={"epoch": 2})))
    assert done.returncode == 2
    assert "spec.ppo.epoch: unknown field; did you mean epochs?" in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_names_the_field_of_a_source_that_is_missing(bench: "Bench") -> None:
    (bench.folder / "reviews.csv").unlink()
    with pytest.raises(UserError, match=r"spec\.data\.prompts\.source: file:.*reviews\.csv does not exist"):
        validate_file(bench.write(), as_json=False)


def test_plan_says_run_reuse_or_skip(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    bench.have(*SHORT[:2])
    plan_file(bench.write(suspend=True), None, None, as_json=True)
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    actions = {name: row["action"] for name, row in rows.items() if row["action"] != "skip"}
    assert actions == dict(zip(SHORT, ["reuse", "reuse", "run", "run", "run"], strict=True))
    assert rows["sft"]["reason"] == "no data.sft"
    assert not (bench.home.path / "runs").exists()


def test_plan_tells_on_which_card_it_fits_before_the_model_is_imported(
    bench: "Bench", capsys: pytest.CaptureFixture[str]
) -> None:
    (bench.folder / "model" / "config.json").write_text(json.dumps(NEOX))
    file = bench.write(ppo={"batchSize": 64, "microBatchSize": 4}, lora={"layers": "top:11"})
    plan_file(file, None, None, as_json=False)
    out = capsys.readouterr().out
    assert "Largest that fit 24Gi: ppo.rolloutBatchSize 32, ppo.microBatchSize 16" in out
    assert re.search(r"^Fits: L4 .* h, A10G .* H200 ", out, re.MULTILINE)
    assert re.search(r"^Fits with changes: T4 ", out, re.MULTILINE)
    assert "one H200 was measured" in out

    plan_file(file, None, None, as_json=False, cards=True)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "quantization.computeDtype float16, ppo.rolloutBatchSize" in rows["T4"]
    assert rows["L4"].split()[:3] == ["L4", "23034Mi", "yes"]

    plan_file(file, None, None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    cards = {each["card"]: each for each in found["cards"]}
    assert (found["largest"]["ppo.rolloutBatchSize"], found["suggestions"]) == (32, [])
    assert cards["H200"]["fits"]
    assert cards["H200"]["largestRolloutBatchSize"] == 64
    assert not cards["T4"]["fits"]
    assert set(cards["H200"]["seconds"]) == {"ppo", "evaluate", "total"}  # nothing else is trained in this run
    assert cards["H200"]["seconds"]["total"] < cards["L4"]["seconds"]["total"] < cards["T4"]["seconds"]["total"]


def test_plan_counts_only_what_would_run_and_names_cards_that_are_too_small(
    bench: "Bench", capsys: pytest.CaptureFixture[str]
) -> None:
    (bench.folder / "model" / "config.json").write_text(json.dumps(NEOX | {"num_hidden_layers": 80}))
    bench.have(*SHORT[1:4])
    file = bench.write()
    plan_file(file, None, None, as_json=True)
    cards = {each["card"]: each for each in json.loads(capsys.readouterr().out)["cards"]}
    assert (cards["T4"]["changes"], cards["T4"]["seconds"]) == (None, None)
    assert set(cards["H200"]["seconds"]) == {"evaluate", "total"}
    plan_file(file, None, None, as_json=False)
    assert re.search(r"^Too small: T4", capsys.readouterr().out, re.MULTILINE)


def test_plan_says_why_memory_and_time_are_not_known_yet(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    plan_file(bench.write(), None, None, as_json=False)
    assert "known once the model is imported (its config.json names its sizes as no" in capsys.readouterr().out


def test_run_prints_json_alone_on_standard_output(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    bench.have(*SHORT[:4])
    assert run_file(bench.write(), None, None, json=True, command=bench.command) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["phase"] == "Succeeded"
    assert "evaluate  succeeded" in err
    report = bench.home.run_folder("tiny").path / "report.html"
    assert f"Report: {report}" in err
    assert "tiny report" in report.read_text()


def test_run_sums_up_what_changed_and_what_it_cost(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"samples": 64, "reward": REWARD, "scorers": {"vader": REWARD}, "kl": {"mean": 6.3, "low": 6, "high": 7}}
    bench.have(*SHORT[:4])
    bench.have("evaluate", report=figures)
    assert run_file(bench.write(), None, None, json=False, command=bench.command) == 0
    out = capsys.readouterr().out
    assert "64 held-out prompts" in out
    vader = next(line.split() for line in out.splitlines() if line.startswith("vader"))
    assert vader == ["vader", "0.1", "0.6", "+0.5", "[0.4,", "0.6]", "75%"]
    assert "KL paid for it: 6.3 [6, 7] nats a response" in out


@pytest.mark.parametrize("failure", ["user", "gate", "bug"])
def test_a_failed_run_exits_with_its_class_and_says_where(
    bench: "Bench", capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    bench.misbehave(import_model=[failure])
    assert run_file(bench.write(), None, None, json=False, command=bench.command) == EXIT_CODES[failure]  # type: ignore[index]
    assert capsys.readouterr().err == f"rlhf: import-model: import-model went {failure}\n"


def test_a_deadline_that_passed_exits_as_a_missed_gate() -> None:
    assert exit_code("DeadlineExceeded") == EXIT_CODES["gate"]


@pytest.mark.parametrize(("failure", "code"), EXIT_CODES.items())
def test_every_failure_class_has_its_exit_code(failure: str, code: int) -> None:
    assert exit_code(failure[:1].upper() + failure[1:]) == code


def test_a_suspended_run_says_how_to_go_on(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    assert run_file(bench.write(suspend=True), None, None, json=False, command=bench.command) == 130
    assert "spec.suspend is true" in capsys.readouterr().err


def test_the_store_can_be_named(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    url = (bench.folder / "elsewhere").as_uri()
    bench.misbehave(import_prompts=["user"])
    run_file(bench.write(), url, None, json=False, command=bench.command)
    list_artifacts(None, Place(store_url=url), as_json=True)
    assert [row["ref"].split("/")[0] for row in json.loads(capsys.readouterr().out.splitlines()[-1])][:1] == ["model"]
    assert not (bench.home.path / "store").exists()


def test_status_lists_runs_and_shows_one(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    show_runs(as_json=True)
    finish(bench)
    show_runs(as_json=True)
    show_run("tiny", as_json=True)
    none, runs, one = map(json.loads, capsys.readouterr().out.splitlines())
    assert none == []
    assert runs == [{"name": "tiny", "phase": "Succeeded"}]
    assert (one["name"], one["active"], len(one["stages"])) == ("tiny", False, 10)


def test_status_tells_a_killed_run_from_one_that_runs(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    finish(bench)
    folder = bench.home.run_folder("tiny")
    folder.write_status(folder.need_status().model_copy(update={"phase": "Running"}))
    show_runs(as_json=True)
    with folder.locked():
        show_runs(as_json=True)
    killed, running = map(json.loads, capsys.readouterr().out.splitlines())
    assert (killed[0]["phase"], running[0]["phase"]) == ("Interrupted", "Running")


def test_report_is_copied_out(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    finish(bench)
    report("tiny", bench.folder / "page.html")
    assert "tiny report" in (bench.folder / "page.html").read_text()
    assert capsys.readouterr().out.strip() == str(bench.folder / "page.html")
    with pytest.raises(UserError, match="No such file or directory; name a file that can be written"):
        report("tiny", bench.folder / "none" / "page.html")


def test_report_of_an_unfinished_run_says_so(bench: "Bench") -> None:
    bench.run(suspend=True)
    with pytest.raises(UserError, match="'tiny' has no report yet: its phase is Suspended"):
        report("tiny", bench.folder / "page.html")


def test_logs_are_those_of_the_newest_attempt_unless_a_stage_is_named(
    bench: "Bench", capsys: pytest.CaptureFixture[str]
) -> None:
    bench.misbehave(evaluate=["bug"])
    bench.run()
    show_log(None, None, follow=False)
    newest = capsys.readouterr()
    assert newest.err == "rlhf: tiny, evaluate, attempt 1\n"
    path = bench.home.run_folder("tiny").path
    (path / "ppo" / "1" / "stage.log").write_text("loss 0.5\n")
    show_log("tiny", "ppo", follow=True)  # has ended: nothing to wait for
    assert capsys.readouterr().out == "loss 0.5\n"
    assert newest.out == (path / "evaluate" / "1" / "stage.log").read_text()
    with pytest.raises(UserError, match="sft has not begun; these have: import-model"):
        show_log("tiny", "sft", follow=False)
    with pytest.raises(UserError, match="there is no such stage; use one of import-model,"):
        show_log("tiny", "pppo", follow=False)


def test_logs_are_followed_until_the_stage_ends(bench: "Bench") -> None:
    bench.misbehave(reward=["slow"])
    driver = bench.drive()
    try:
        bench.wait_for(lambda: "reward" in bench.began())
        log = bench.home.run_folder("tiny").path / "reward" / "1" / "stage.log"
        with subprocess.Popen([RLHF, "logs", "-f"], text=True, stdout=subprocess.PIPE) as logs:
            assert logs.stdout is not None
            with log.open("a") as more:
                more.write("step 1\n")
            while logs.stdout.readline() != "step 1\n":
                assert logs.poll() is None
            driver.terminate()
            assert logs.wait(timeout=30) == 0
    finally:
        driver.terminate()
        driver.communicate()


def test_verify_finds_an_altered_file(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    finish(bench)
    assert verify_artifacts([], Place(), as_json=False) == 0
    victim = next((bench.home.path / "store").rglob("policy/*/*/report.json"))
    victim.chmod(0o644)
    victim.write_bytes(b"[]")
    assert verify_artifacts(["policy"], Place(), as_json=False) == 2
    assert "report.json" in capsys.readouterr().out.splitlines()[-1]


def test_gc_keeps_what_the_runs_name(bench: "Bench", capsys: pytest.CaptureFixture[str]) -> None:
    bench.have(*SHORT, ppo={"epochs": 3})
    finish(bench)
    collect_garbage(0, True, True, Place(), as_json=True)
    collect_garbage(0, True, False, Place(), as_json=True)
    list_artifacts(None, Place(), as_json=True)
    rehearsed, removed, left = map(json.loads, capsys.readouterr().out.splitlines())
    assert rehearsed == removed
    assert len(removed) == 2  # the other run's policy and evaluation
    assert len(left) == len(SHORT)


def test_generate_asks_for_the_model_and_the_policy_of_the_run(
    bench: "Bench", capfd: pytest.CaptureFixture[str]
) -> None:
    finish(bench)
    echo = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    assert generate("tiny", ["a b", "c"], False, 9, 0.5, 3, True, command=echo) == 0
    assert generate("tiny", ["a b"], True, 9, 0.5, 3, False, command=echo) == 0
    both, before = map(json.loads, capfd.readouterr().out.splitlines())
    options = dict(zip(both[::2], both[1::2], strict=False))
    assert options["--model"].startswith("model/")
    assert options["--policy"].startswith("policy/")
    assert (options["--tokens"], options["--temperature"], options["--seed"]) == ("9", "0.5", "3")
    assert [both[i + 1] for i, word in enumerate(both) if word == "--prompt"] == ["a b", "c"]
    assert both[-1] == "--json"
    assert "--policy" not in before


def test_generate_needs_a_policy(bench: "Bench") -> None:
    bench.run(suspend=True)
    with pytest.raises(UserError, match="has no model yet"):
        generate("tiny", ["a"], False, 9, 0.5, 3, True)
