"""Writes the files that are made from the models. `--check` writes nothing and fails if one is stale."""

import sys
from pathlib import Path

import yaml

from rlhf_api.crd import crd

ROOT = Path(__file__).parent.parent
HEADER = "# Made by `make generate` from operator/rlhf_api; do not edit.\n"


def main() -> int:
    files = {ROOT / "manifests/crd/rlhfruns.yaml": HEADER + yaml.safe_dump(crd(), sort_keys=False, width=120)}
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is stale: run `make generate`", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
