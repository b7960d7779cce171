"""What the watches of the API server last said: every run, and the Jobs and pods of stages. Writes go to it too."""

import threading
from collections.abc import Iterable
from typing import Final, Literal

from rlhf_api.names import LABEL_RUN
from rlhf_operator.pod_template import Document

Kind = Literal["run", "job", "pod"]
POD_ENDED: Final = ("Succeeded", "Failed")  # phases
Key = tuple[str, str]
"""Namespace and name."""


class Seen:
    """Objects by kind, namespace and name. An older version never replaces a newer one. Safe to use from threads.

    It may lag behind the API server: whoever writes from what is seen here must be right even then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[Kind, dict[Key, Document]] = {"run": {}, "job": {}, "pod": {}}
        self._of_run: dict[Kind, dict[Key, set[Key]]] = {"job": {}, "pod": {}}

    def put(self, kind: Kind, document: Document) -> None:
        """Note an object as it now is."""
        with self._lock:
            self._put(kind, document)

    def drop(self, kind: Kind, document: Document) -> None:
        """Note that an object is gone. A pod that had ended stays until `replace`: how it did may not be read yet."""
        with self._lock:
            if kind == "pod" and document.get("status", {}).get("phase") in POD_ENDED:
                self._put(kind, document)
            else:
                self._drop(kind, key_of(document))

    def replace(self, kind: Kind, documents: Iterable[Document], version: str) -> list[Key]:
        """Note all objects of a kind as they were at `version` of the API server, so that no missed event matters.

        Returns the runs whose objects changed by it.
        """
        with self._lock:
            listed = {key_of(document): document for document in documents}
            known = self._objects[kind]
            gone = [key for key, old in known.items() if key not in listed and _version(old) <= int(version)]
            changed = [known[key] for key in gone]
            for key in gone:
                self._drop(kind, key)
            changed += [document for document in listed.values() if self._put(kind, document)]
            return sorted({run for document in changed if (run := run_of(kind, document))})

    def runs(self) -> list[Key]:
        """Every run."""
        with self._lock:
            return list(self._objects["run"])

    def run(self, key: Key) -> Document | None:
        """One run, or None."""
        with self._lock:
            return self._objects["run"].get(key)

    def of_run(self, kind: Kind, run: Key) -> list[Document]:
        """The Jobs, or the pods, with the label of a run."""
        with self._lock:
            return [self._objects[kind][key] for key in sorted(self._of_run[kind].get(run, ()))]

    def _put(self, kind: Kind, document: Document) -> bool:
        key = key_of(document)
        old = self._objects[kind].get(key)
        if old is not None and _version(old) >= _version(document):
            return False
        self._objects[kind][key] = _read_of(kind, document)
        if kind != "run" and (run := run_of(kind, document)):
            self._of_run[kind].setdefault(run, set()).add(key)
        return True

    def _drop(self, kind: Kind, key: Key) -> None:
        old = self._objects[kind].pop(key, None)
        if old is None or kind == "run" or (run := run_of(kind, old)) is None:
            return
        left = self._of_run[kind].get(run, set())
        left.discard(key)
        if not left:
            self._of_run[kind].pop(run, None)


def _read_of(kind: Kind, document: Document) -> Document:
    """What is read of an object. The rest, kept for thousands of them, would be most of the operator's memory."""
    metadata = {name: value for name, value in document["metadata"].items() if name != "managedFields"}
    match kind:
        case "job":
            spec = {name: value for name, value in document.get("spec", {}).items() if name != "template"}
            return {**document, "metadata": metadata, "spec": spec}
        case "pod":
            return {"metadata": metadata, "status": document.get("status", {})}
    return {**document, "metadata": metadata}


def key_of(document: Document) -> Key:
    """The namespace and name of an object."""
    return document["metadata"].get("namespace", ""), document["metadata"]["name"]


def run_of(kind: Kind, document: Document) -> Key | None:
    """The run that an object is, or belongs to by its label."""
    if kind == "run":
        return key_of(document)
    name = document["metadata"].get("labels", {}).get(LABEL_RUN)
    return (document["metadata"].get("namespace", ""), name) if name else None


def _version(document: Document) -> int:
    # Kubernetes 1.35 made versions of one kind comparable as numbers; they have always been numbers.
    return int(document["metadata"]["resourceVersion"])
