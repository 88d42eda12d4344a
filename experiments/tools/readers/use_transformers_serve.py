"""`transformers serve`: the server of transformers, asked for completions.

The command is started by its entry point: the tool's environment adds only what a server needs, and
takes transformers from the project's.
"""

import socket
import subprocess
import sys
from pathlib import Path

from protocol import Request
from server import ask, wait

request = Request.read()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
address = f"http://127.0.0.1:{port}"
program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
words = ["serve", request.folder, "--device", "cpu", "--dtype", "float32", "--port", str(port)]
log = (Path(request.work) / "server.log").open("w")
print("$ transformers", *words)
server = subprocess.Popen([*program, *words], stdout=log, stderr=subprocess.STDOUT)
try:
    wait(address, server, Path(log.name))
    settings = {"model": request.folder, "max_tokens": request.new_tokens, "temperature": 0}
    answers = [
        ask(f"{address}/v1/completions", prompt=prompt, **settings) for prompt in request.prompts
    ]
finally:
    server.terminate()
    server.wait()
request.report("float32", continuations=[answer["choices"][0]["text"] for answer in answers])
