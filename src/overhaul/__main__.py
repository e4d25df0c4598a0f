"""`python -m overhaul`: the `overhaul` command, alone or as one of several processes.

    torchrun --nproc-per-node 2 -m overhaul run recipe.yaml -o OUT
    accelerate launch --multi_gpu --num_processes 2 -m overhaul run recipe.yaml -o OUT

1. Of several processes the main one alone shows progress and prints; the others end with it.
2. If one fails, the first to do so says why. Its launcher ends the others.
3. Launched processes end at once when their work is done, without taking the interpreter down: a native thread of the
   process group that is still alive then aborts it now and then ("terminate called without an active exception"), and the
   launcher counts a finished run as failed.
4. `accelerate launch --cpu` starts one process only unless MPI is there; on CPUs take `torchrun`.
"""

from __future__ import annotations

import gc
import io
import os
import sys

from overhaul import cli


def main() -> None:
    """Run the command; of several processes speak for all or not at all."""
    if "LOCAL_RANK" not in os.environ:
        try:
            cli.main()
        finally:
            gc.freeze()  # to look for garbage among all that was imported, at the very end, takes a second
        return
    said = io.StringIO()
    cli.console.quiet = cli.notes.quiet = os.environ.get("RANK", "0") != "0"
    cli.errors = cli.Terminal(file=said, force_terminal=sys.stderr.isatty())
    try:
        cli.main()
    except SystemExit as end:
        from overhaul import processes

        if end.code and processes.first_to_fail():
            sys.stderr.write(said.getvalue())
            sys.stderr.flush()
        if not end.code:
            processes.leave()
        _end(end.code)


def _end(code: object) -> None:
    """Leave with the exit code that `sys.exit` would leave with, all that was printed being out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
