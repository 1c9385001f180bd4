"""The engine without Headrace, for swap.py: a fresh process loads, and answers prompts.

Usage: `python swap_engine.py '{"model": FILE, "slots": ..., "prompts": [...]}'`. It
imports nothing but the engine, and prints one line with the times: of the first token of the first
prompt, on the monotonic clock, and of the last, since it was given.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import tax_engine


def main() -> None:
    """Load, write one token for each prompt, print."""
    settings, began = json.loads(sys.argv[1]), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        server = tax_engine.load(settings, directory)
        loaded = time.monotonic()
        requests = [tax_engine.Request(prompt, 1) for prompt in settings["prompts"]]
        again = began
        for request in requests:
            again = time.monotonic()
            request.run(server)
    print(
        json.dumps(
            {
                "opened_s": loaded - began,
                "first_at": requests[0].first_at,
                "began_at": began,
                "resident_s": requests[-1].first_at - again,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
