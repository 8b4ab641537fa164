"""`python -m minisd`, and the command `minisd`; cli/main.py has what it does.

What is here is about the process: the signals that end it, and standard files that are closed.

Ctrl-C, SIGTERM and SIGHUP end it in one way. Once the command writes, they raise KeyboardInterrupt,
upon which everything half written is removed. In the first seconds that would not do: Python raises
it wherever it happens to be, and inside the import of torch or numpy that ends in `terminate
called`, in a module that is half there, or in nothing at all. As long as the command has written
nothing, the process therefore ends where it is.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
stopped = float("-inf")  # when the last signal came


def end(number: int, _: object) -> NoReturn:
    with suppress(OSError):  # after SIGHUP the terminal may be gone
        os.write(2, b"\nminisd: interrupted\n")
    os._exit(128 + number)


def stop(number: int, _: object) -> None:
    """Raise KeyboardInterrupt(number); not again within a second, while files are removed."""
    global stopped
    before, stopped = stopped, time.monotonic()
    if stopped - before > 1:
        raise KeyboardInterrupt(number)


def open_standard_files() -> None:
    """Give a standard file that is closed to /dev/null: else the next file that is opened, weights
    or an image, gets its number, and what libraries print goes into it."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            file = open(os.devnull, mode, encoding="utf-8")
            if file.fileno() != number:
                os.dup2(file.fileno(), number)
            setattr(sys, name, file)


def main() -> int:
    open_standard_files()
    ends = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    # Not those that are ignored, as in a shell's background job or under nohup.
    ours = [number for number in numbers if signal.getsignal(number) in ends]
    for number in ours:
        signal.signal(number, end)
    from .cli.main import main

    def before_writing() -> None:
        for number in ours:
            signal.signal(number, stop)

    return main(before_writing=before_writing)


if __name__ == "__main__":
    sys.exit(main())
