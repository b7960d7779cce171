"""What the options --cluster, --namespace, --context and --kubeconfig say, and the command line that says it again."""

import functools
import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

KUBECTL = "kubectl rlhf"  # how kubectl calls the command kubectl-rlhf


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster and namespace a command is about; what is None, the kubeconfig says."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None
    program: str = "rlhf"

    def command(self, *words: str) -> str:
        """The command line that does `words` to the same cluster and namespace."""
        cluster = () if self.program == KUBECTL else ("--cluster",)
        return " ".join([self.program, shlex.join([*words, *cluster, *self.flags])])

    def kubectl(self, *words: str) -> list[str]:
        """The words of a kubectl command about the same cluster and namespace."""
        return ["kubectl", *words, *self.flags]

    @property
    def flags(self) -> tuple[str, ...]:
        """The options that kubectl and this program have in common."""
        named = (("--namespace", self.namespace), ("--context", self.context), ("--kubeconfig", self.kubeconfig))
        return tuple(word for flag, value in named if value is not None for word in (flag, str(value)))


Cluster = Annotated[bool, typer.Option("--cluster", help="A run in a Kubernetes cluster.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Its namespace; the context's, if left out.", metavar="NAME")
]
Context = Annotated[
    str | None, typer.Option(help="Context of the kubeconfig; its current one, if left out.", metavar="NAME")
]
Kubeconfig = Annotated[Path | None, typer.Option(help="Instead of KUBECONFIG or ~/.kube/config.", metavar="FILE")]


def on_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the four options. It gets them as `where`: None for this machine. Any of them means a cluster."""

    @functools.wraps(command)
    def with_options(
        context_: typer.Context,
        cluster: bool,
        namespace: str | None,
        context: str | None,
        kubeconfig: Path | None,
        **others: Any,
    ) -> None:
        where = None
        if cluster or namespace or context or kubeconfig:
            program = context_.find_root().info_name or "rlhf"
            where = ClusterOptions(namespace, context, kubeconfig, program)
        command(where=where, **others)

    added = [
        inspect.Parameter("context_", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, default, kind in (
                ("cluster", False, Cluster),
                ("namespace", None, Namespace),
                ("context", None, Context),
                ("kubeconfig", None, Kubeconfig),
            )
        ),
    ]
    own = [each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != "where"]
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    with_options.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in [*own, *added]}
    del with_options.__wrapped__  # inspect would look through it
    return with_options
