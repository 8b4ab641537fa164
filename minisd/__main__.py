"""`python -m minisd`, and the command `minisd`; cli/main.py has what it does.

What is here is about Ctrl-C in the first seconds. Python raises KeyboardInterrupt wherever it
happens to be, and inside the import of torch or numpy that ends in `terminate called`, in a module
that is half there, or in nothing at all. As long as the command has written nothing, the process
therefore ends where it is.
"""

import os
import signal
import sys


def end(*_: object) -> None:
    os.write(2, b"\nminisd: interrupted\n")
    os._exit(130)


def main() -> int:
    # It is ignored in a shell's background job.
    early = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if early:
        signal.signal(signal.SIGINT, end)
    from .cli.main import main

    def before_writing() -> None:
        if early:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    return main(before_writing=before_writing)


if __name__ == "__main__":
    sys.exit(main())
