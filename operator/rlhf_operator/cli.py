"""The command `rlhf`: its arguments, its errors and its exit codes. What each command does is in its own module.

Those modules are imported by the command that needs them, so that `rlhf --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_api.errors import RLHFError
from rlhf_api.names import EXIT_BUG, EXIT_CODES, EXIT_INTERRUPTED

app = typer.Typer(
    help="RLHF for language models: import, sft, merge, reward, ppo and evaluate from one RLHFRun file.",
    epilog="Exit codes: 0 done, 2 your input, 3 a quality gate, 4 store or network, 5 out of memory, 1 a bug, "
    "130 stopped. --debug, anywhere, shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
artifacts_app = typer.Typer(help="List, check and clean the store.", no_args_is_help=True)
app.add_typer(artifacts_app, name="artifacts")

RunFile = Annotated[Path, typer.Argument(help="RLHFRun as YAML or JSON.", metavar="FILE")]
RunName = Annotated[str, typer.Argument(help="metadata.name of a run in .rlhf/runs.", metavar="RUN")]
StoreURL = Annotated[
    str | None, typer.Option("--store", help="file:///folder or s3://bucket/prefix.  [default: .rlhf/store]")
]
Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint URL.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command()
def run(file: RunFile, store: StoreURL = None, endpoint: Endpoint = None, json: AsJSON = False) -> None:
    """Run the chain, or continue it. Ctrl-C saves a checkpoint and stops; run again to continue."""
    from rlhf_operator.run_command import run_file

    raise typer.Exit(run_file(file, store, endpoint, json))


@app.command()
def validate(file: RunFile, json: AsJSON = False) -> None:
    """Check the file: every field, every rule, every local source."""
    from rlhf_operator.plan_command import validate_file

    raise typer.Exit(validate_file(file, json))


@app.command("plan")
def plan_(file: RunFile, store: StoreURL = None, endpoint: Endpoint = None, json: AsJSON = False) -> None:
    """Show what `rlhf run` would do: run, reuse or skip each stage, and the memory each needs."""
    from rlhf_operator.plan_command import plan_file

    plan_file(file, store, endpoint, json)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="A run; all, if left out.", metavar="RUN")] = None,
    json: AsJSON = False,
) -> None:
    """Show the runs of this folder, or the stages of one."""
    from rlhf_operator.status_command import show_run, show_runs

    if name is None:
        show_runs(json)
    else:
        show_run(name, json)


@app.command()
def report(
    name: RunName,
    out: Annotated[Path | None, typer.Option(help="Where to write it.  [default: RUN-report.html]")] = None,
) -> None:
    """Copy the report of a finished run out of the store and print its path."""
    from rlhf_operator.status_command import copy_report

    copy_report(name, out or Path(f"{name}-report.html"))


@app.command()
def generate(
    name: RunName,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given again.")],
    without_adapter: Annotated[bool, typer.Option("--without-adapter", help="Only the model before PPO.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: AsJSON = False,
) -> None:
    """Try the policy of a finished run, with its adapter and without."""
    from rlhf_operator.generate_command import generate_from

    raise typer.Exit(generate_from(name, prompt, without_adapter, tokens, temperature, seed, json))


@artifacts_app.command("ls")
def artifacts_ls(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, such as policy.")] = None,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
) -> None:
    """List the artifacts of the store."""
    from rlhf_operator.artifacts_command import list_artifacts

    list_artifacts(kind, store, endpoint, json)


@artifacts_app.command("verify")
def artifacts_verify(
    refs: Annotated[
        list[str] | None, typer.Argument(help="KIND/DIGEST, or the first digits; all, if left out.")
    ] = None,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
) -> None:
    """Read artifacts back and compare every byte with what was committed."""
    from rlhf_operator.artifacts_command import verify_artifacts

    raise typer.Exit(verify_artifacts(refs or [], store, endpoint, json))


@artifacts_app.command("gc")
def artifacts_gc(
    older_than: Annotated[float, typer.Option(min=0, help="Hours that garbage must have been left alone.")] = 24.0,
    unkept: Annotated[
        bool, typer.Option("--unkept", help="Also remove artifacts that no run of this folder names.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
) -> None:
    """Remove what killed stages left behind."""
    from rlhf_operator.artifacts_command import collect_garbage

    collect_garbage(older_than, unkept, dry_run, store, endpoint, json)


def main() -> None:
    """The console script. A failure is one line on standard error and its class's exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="rlhf")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # `rlhf … | head`
        sys.stderr.close()
        sys.exit(EXIT_BUG)
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, RLHFError)
        text = str(error) if known else f"{type(error).__name__}: {error}; this is a bug: show it with --debug"
        print(f"rlhf: {text}", file=sys.stderr)
        sys.exit(EXIT_CODES[error.failure] if isinstance(error, RLHFError) else EXIT_BUG)
