"""The commands `rlhf` and `kubectl rlhf`: their arguments, errors and exit codes. What each does is in its own module.

Those modules are imported by the command that needs them, so that `rlhf --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_api.errors import RLHFError, UserError
from rlhf_api.names import EXIT_BUG, EXIT_CODES, EXIT_INTERRUPTED
from rlhf_operator.cluster_options import KUBECTL, ClusterOptions, on_cluster

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

IN_CLUSTERS = ("run", "status", "logs", "suspend", "resume", "report", "generate")
ARTIFACTS_IN_CLUSTERS = ("ls", "verify", "gc")
"""The commands that know runs in a cluster."""

RunFile = Annotated[Path, typer.Argument(help="RLHFRun as YAML or JSON.", metavar="FILE")]
RunName = Annotated[str, typer.Argument(help="metadata.name of a run of this folder or a cluster.", metavar="RUN")]
ClusterRun = Annotated[str, typer.Argument(help="metadata.name of a run.", metavar="RUN")]
StoreURL = Annotated[
    str | None, typer.Option("--store", help="file:///folder or s3://bucket/prefix; .rlhf/store, if left out.")
]
Endpoint = Annotated[str | None, typer.Option(help="S3 endpoint URL.")]
ReachableEndpoint = Annotated[
    str | None, typer.Option("--endpoint", help="S3 endpoint URL, where the run's own is none for this machine.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command()
@on_cluster
def run(
    file: RunFile,
    where: ClusterOptions | None,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="In a cluster: show it until it ends.")] = True,
) -> None:
    """Run the chain, or continue it. Ctrl-C saves a checkpoint and stops; a run in a cluster goes on without you."""
    if where is None:
        from rlhf_operator.run_command import run_file

        raise typer.Exit(run_file(file, store, endpoint, json))
    if store or endpoint:
        raise UserError("--store, --endpoint: the file's spec.objectStore says where a cluster keeps artifacts")
    from rlhf_operator.cluster_run_command import run_in_cluster

    raise typer.Exit(run_in_cluster(file, where, follow, json))


@app.command()
def validate(file: RunFile, json: AsJSON = False) -> None:
    """Check the file: every field, every rule, every local source."""
    from rlhf_operator.plan_command import validate_file

    raise typer.Exit(validate_file(file, json))


@app.command("plan")
def plan_(
    file: RunFile,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
    cards: Annotated[bool, typer.Option("--cards", help="A row a card: fits, batches, time of each stage.")] = False,
) -> None:
    """Show what `rlhf run` would do with each stage, the memory it needs, and on which cards it takes how long."""
    from rlhf_operator.plan_command import plan_file

    plan_file(file, store, endpoint, json, cards)


@app.command()
@on_cluster
def status(
    where: ClusterOptions | None,
    name: Annotated[str | None, typer.Argument(help="A run; all, if left out.", metavar="RUN")] = None,
    everywhere: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="The runs of every namespace of a cluster.")
    ] = False,
    json: AsJSON = False,
) -> None:
    """Show the runs of this folder or of a cluster, or the stages of one."""
    if where is None and not everywhere:
        from rlhf_operator.status_command import show_run, show_runs

        show_runs(json) if name is None else show_run(name, json)
        return
    from rlhf_operator.cluster_status_command import show_cluster_run, show_cluster_runs

    where = where or ClusterOptions()
    show_cluster_runs(where, everywhere, json) if name is None else show_cluster_run(name, where, json)


@app.command()
@on_cluster
def logs(
    where: ClusterOptions | None,
    name: Annotated[str | None, typer.Argument(help="A run; the newest, if left out.", metavar="RUN")] = None,
    stage: Annotated[str | None, typer.Option(help="One stage, such as ppo; the newest, if left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while it is written.")] = False,
) -> None:
    """Print what a stage wrote: its newest attempt, running or not."""
    if where is None:
        from rlhf_operator.logs_command import show_log

        show_log(name, stage, follow)
        return
    from rlhf_operator.cluster_logs_command import show_cluster_log

    show_cluster_log(name, where, stage, follow)


@app.command()
@on_cluster
def suspend(name: ClusterRun, where: ClusterOptions | None) -> None:
    """Stop a run in a cluster; its stages save a checkpoint."""
    from rlhf_operator.resume_command import suspend_run

    suspend_run(name, _need_cluster(where, "a run of this folder is suspended with Ctrl-C"))


@app.command()
@on_cluster
def resume(name: ClusterRun, where: ClusterOptions | None) -> None:
    """Let a run in a cluster go on, also one that has failed."""
    from rlhf_operator.resume_command import resume_run

    resume_run(name, _need_cluster(where, "a run of this folder goes on with `rlhf run FILE`"))


def _need_cluster(where: ClusterOptions | None, otherwise: str) -> ClusterOptions:
    if where is None:
        raise UserError(f"{otherwise}; for a run in a cluster add --cluster")
    return where


@app.command()
@on_cluster
def report(
    name: RunName,
    where: ClusterOptions | None,
    out: Annotated[Path | None, typer.Option(help="Where to write it; RUN-report.html, if left out.")] = None,
    endpoint: ReachableEndpoint = None,
) -> None:
    """Copy the report of a finished run out of the store and print its path."""
    from rlhf_operator.open_run import opened
    from rlhf_operator.status_command import copy_report

    with opened(name, where, endpoint) as run:
        copy_report(run, out or Path(f"{name}-report.html"))


@app.command()
@on_cluster
def generate(
    name: RunName,
    where: ClusterOptions | None,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given again.")],
    without_adapter: Annotated[bool, typer.Option("--without-adapter", help="Only the model before PPO.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    endpoint: ReachableEndpoint = None,
    json: AsJSON = False,
) -> None:
    """Try the policy of a finished run on this machine, with its adapter and without."""
    from rlhf_operator.generate_command import generate_from
    from rlhf_operator.open_run import opened

    with opened(name, where, endpoint) as run:
        code = generate_from(run, prompt, without_adapter, tokens, temperature, seed, json)
    raise typer.Exit(code)


@artifacts_app.command("ls")
@on_cluster
def artifacts_ls(
    where: ClusterOptions | None,
    kind: Annotated[str | None, typer.Argument(help="Only this kind, such as policy.")] = None,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
) -> None:
    """List the artifacts of the store."""
    from rlhf_operator.artifacts_command import Place, list_artifacts

    list_artifacts(kind, Place(where, store, endpoint), json)


@artifacts_app.command("verify")
@on_cluster
def artifacts_verify(
    where: ClusterOptions | None,
    refs: Annotated[
        list[str] | None, typer.Argument(help="KIND/DIGEST, or the first digits; all, if left out.")
    ] = None,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
) -> None:
    """Read artifacts back and compare every byte with what was committed."""
    from rlhf_operator.artifacts_command import Place, verify_artifacts

    raise typer.Exit(verify_artifacts(refs or [], Place(where, store, endpoint), json))


@artifacts_app.command("gc")
@on_cluster
def artifacts_gc(
    where: ClusterOptions | None,
    older_than: Annotated[float, typer.Option(min=0, help="Hours that garbage must have been left alone.")] = 24.0,
    unkept: Annotated[
        bool,
        typer.Option("--unkept", help="Also remove artifacts that no run of this folder, or of the cluster, names."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    store: StoreURL = None,
    endpoint: Endpoint = None,
    json: AsJSON = False,
) -> None:
    """Remove what killed stages left behind."""
    from rlhf_operator.artifacts_command import Place, collect_garbage

    collect_garbage(older_than, unkept, dry_run, Place(where, store, endpoint), json)


def main() -> None:
    """The console script `rlhf`. A failure is one line on standard error and its class's exit code."""
    _main("rlhf")


def kubectl_main() -> None:
    """The console script `kubectl-rlhf`, which kubectl runs as `kubectl rlhf`: the same, about runs in a cluster."""
    in_cluster = {"cluster": True}
    _main(
        KUBECTL,
        {
            **dict.fromkeys(IN_CLUSTERS, in_cluster),
            "artifacts": dict.fromkeys(ARTIFACTS_IN_CLUSTERS, in_cluster),
        },
    )


def _main(program: str, defaults: dict[str, Any] | None = None) -> None:
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name=program, default_map=defaults)
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
