"""Asks a server of this machine that has OpenAI's interface, and waits until it is ready."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(address: str, **fields: object) -> dict[str, Any]:
    """The JSON answer to a request; fields make it a POST."""
    body = json.dumps(fields).encode() if fields else None
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read() or "{}")  # some answer /health with nothing


def wait(address: str, server: subprocess.Popen, log: Path, seconds: float = 600) -> None:
    """Waits until the server answers /health.

    Raises:
        RuntimeError: it has ended, or takes longer; the message is the end of its log.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            ask(f"{address}/health")
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(log.read_text()[-3000:]) from error
            time.sleep(1)
