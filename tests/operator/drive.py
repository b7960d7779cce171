"""`rlhf run FILE` with another stage program: `python drive.py FILE COMMAND…`. Errors end it as they end `rlhf`."""

import sys
from pathlib import Path

from rlhf_api.errors import RLHFError
from rlhf_api.names import EXIT_CODES
from rlhf_operator.run_command import run_file

if __name__ == "__main__":
    try:
        sys.exit(run_file(Path(sys.argv[1]), None, None, False, command=sys.argv[2:]))
    except RLHFError as error:
        sys.exit(print(f"rlhf: {error}", file=sys.stderr) or EXIT_CODES[error.failure])
