"""`transformers serve`: the server of transformers, asked for completions.

The command is started by its entry point: the tool's environment adds only what a server needs, and
takes transformers from the project's.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from protocol import Request

request = Request.read()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
address = f"http://127.0.0.1:{port}"
program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
words = ["serve", request.folder, "--device", "cpu", "--dtype", "float32", "--port", str(port)]
log = (Path(request.work) / "server.log").open("w")


def ask(path: str, **fields: object) -> dict:
    """The answer of the server."""
    body = json.dumps(fields).encode() if fields else None
    asked = urllib.request.Request(
        address + path, data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=600) as answer:
        return json.load(answer)


print("$ transformers", *words)
server = subprocess.Popen([*program, *words], stdout=log, stderr=subprocess.STDOUT)
try:
    for _ in range(300):
        try:
            ask("/health")
            break
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, Path(log.name).read_text()[-2000:]
            time.sleep(2)
    settings = {"model": request.folder, "max_tokens": request.new_tokens, "temperature": 0}
    answers = [ask("/v1/completions", prompt=prompt, **settings) for prompt in request.prompts]
finally:
    server.terminate()
    server.wait()
request.report("float32", continuations=[answer["choices"][0]["text"] for answer in answers])
