"""Writes the files that are made from the models. `--check` writes nothing and fails if one is stale."""

import sys
from pathlib import Path

import yaml

from rlhf_api.crd import crd

ROOT = Path(__file__).parent.parent
HEADER = "# Made by `make generate` from operator/rlhf_api; do not edit.\n"


def main() -> int:
    document = crd()
    files = {
        ROOT / "manifests/crd/rlhfruns.yaml": HEADER + as_yaml(document),
        ROOT / "charts/rlhf-operator/templates/crd.yaml": HEADER + chart_template(document),
    }
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is stale: run `make generate`", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    return 1 if stale and "--check" in sys.argv else 0


def as_yaml(document: object) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=120)


def chart_template(document: dict[str, object]) -> str:
    """The CRD as a template of the chart: Helm upgrades what is in templates/, never what is in crds/."""
    head = as_yaml({key: document[key] for key in ("apiVersion", "kind", "metadata")})
    body = as_yaml({"spec": document["spec"]})
    if "{{" in body:
        raise SystemExit("hack/generate.py: the CRD holds {{, which Helm would read as its own; write it otherwise")
    annotations = "  {{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{- end }}\n"
    return "{{- if .Values.crds.install }}\n" + head + annotations + body + "{{- end }}\n"


if __name__ == "__main__":
    sys.exit(main())
