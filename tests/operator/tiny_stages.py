"""A stage program that keeps the contract of `python -m rlhf_pipeline` and takes milliseconds: for tests of the runner.

Each stage counts to ten and commits a real artifact. `--script FILE` is a JSON object of stage -> list, one word an
attempt, of what goes wrong: user, gate, infrastructure, outOfMemory, bug (a result with that failure), crash (no
result), killed, starved (so too, and FILE.vmstat counts it as the kernel's), segfault, lie (claims success without an
artifact), slow (counts to 400), deaf (so too, and ignores SIGTERM), environment (fails, saying what it was given) or
fine. Every attempt appends a line to FILE.log.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from rlhf_api.names import EXIT_CODES, EXIT_INTERRUPTED, EXIT_OK, PROGRESS_FILE
from rlhf_api.stage import Progress, StageConfig, StageFailure, StageResult
from rlhf_store.artifacts import open_artifacts

stop = False


def on_signal(*_: object) -> None:
    global stop
    stop = True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", type=Path, required=True)
    for name in ("config", "work", "result"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, on_signal)
    config = StageConfig.model_validate_json(options.config.read_bytes())
    log = options.script.with_suffix(".log")
    began = [line for line in log.read_text().splitlines() if line] if log.exists() else []
    turn = sum(line.split()[0] == config.stage for line in began)
    words = json.loads(options.script.read_text()).get(config.stage, [])
    word = words[turn] if turn < len(words) else "fine"
    with log.open("a") as lines:
        lines.write(f"{config.stage} {os.getpid()} {word}\n")

    def end(code: int, **outcome: object) -> int:
        result = StageResult(stage=config.stage, seconds=0.5, **outcome)  # type: ignore[arg-type]
        options.result.write_bytes(result.to_bytes())
        return code

    artifacts = open_artifacts(config.store)
    for ref in config.inputs.values():
        artifacts.need(ref)
    match word:
        case "crash":
            sys.exit("the sky fell")
        case "starved":
            options.script.with_suffix(".vmstat").write_text("pgfault 9\noom_kill 4\n")
            os.kill(os.getpid(), signal.SIGKILL)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "lie":
            return end(EXIT_OK, artifact=config.output)
        case "fine" | "slow":
            pass
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "environment":
            message = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
            return end(EXIT_CODES["user"], failure=StageFailure(failure="user", message=message))
        case _:
            return end(EXIT_CODES[word], failure=StageFailure(failure=word, message=f"{config.stage} went {word}"))  # type: ignore[index,arg-type]

    checkpoint = options.work / "step"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    total = 10 if word == "fine" else 400
    for step in range(first, total):
        temporary = options.work / ".step"
        temporary.write_text(str(step))
        temporary.rename(checkpoint)
        progress = Progress(stage=config.stage, step=step + 1, total=total, phase="counting", metrics={"loss": 1.0})
        temporary = options.work / ".progress"
        temporary.write_text(progress.model_dump_json(by_alias=True))
        temporary.rename(options.work / PROGRESS_FILE)
        if stop:
            failure = StageFailure(failure="infrastructure", message="stopped by SIGTERM; run again to continue")
            return end(EXIT_INTERRUPTED, failure=failure)
        time.sleep(0.02 if total == 400 else 0)
    writer = artifacts.writer(config.output, config.attempt)
    metrics = {"loss": 0.5, "resumedFrom": float(first)}
    writer.add_bytes("report.json", json.dumps({"metrics": metrics}).encode())
    writer.add_bytes("logs/report.html", b"<title>tiny report</title>")
    writer.commit({"metrics": metrics, "seconds": 0.5})
    return end(EXIT_OK, artifact=config.output, metrics=metrics)


if __name__ == "__main__":
    sys.exit(main())
