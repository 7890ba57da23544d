"""Runs programs for the tests, by lines on standard input; all of them end with that input.

The tests check that they leave no child process behind. So the servers, which live longer than
one test, are children of this process, and do not outlive the tests even where those crash.

A line is JSON: {"start": NAME, "command": [...], "log": PATH} or {"signal": NUMBER, "name": NAME}.
The answer is a line: `null` while the program runs, else how it ended.
"""

import json
import signal
import subprocess
import sys
from typing import Final

_SIGNAL_THAT_ENDS: Final = signal.SIGKILL


def main() -> None:
    running: dict[str, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        for line in sys.stdin:
            told = json.loads(line)
            if name := told.get("start"):
                with open(told["log"], "ab") as log:
                    running[name] = subprocess.Popen(told["command"], stdout=log, stderr=log)
            else:
                name = told["name"]
                running[name].send_signal(told["signal"])
                if told["signal"] == _SIGNAL_THAT_ENDS:
                    running[name].wait()
            sys.stdout.write(json.dumps(running[name].poll()) + "\n")
            sys.stdout.flush()
    finally:
        for process in running.values():
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
