"""Clients of the local Hub: fresh processes, since the client reads its environment at import."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = "RESULT "
# A process as on a machine that has transformers and not this package: -I keeps PYTHONPATH and the working folder out,
# and where the package is installed beside transformers its names are blocked.
WITHOUT_PACKAGE = (
    "import sys\nfor name in ('modeling_unihyperlora', 'trainers'):\n    sys.modules[name] = None\n"
    "import importlib.util\n"
)
FINISH = "\nimport json\nprint('\\nRESULT ' + json.dumps(result))\n"


def client_environment(url: str, home: Path, user: str | None = "alice") -> dict[str, str]:
    """Environment of a client process: the server, an empty cache, a token, no other network."""
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS"))
    }
    own = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # the transfer protocol beside plain HTTP, which this server does not speak
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "UNIHYPERLORA_CACHE": str(home / "unihyperlora"),
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",  # sums are rounded alike in every process
    }
    return keep | own | ({"HF_TOKEN": f"token-of-{user}"} if user else {})


def run_client(
    code: str,
    environment: dict[str, str],
    *,
    package: bool = True,
    offline: bool = False,
    python: str = sys.executable,
    cwd: Path | None = None,
    timeout: float = 240,
) -> object:
    """Run ``code`` in a fresh process and return the value of its variable ``result``.

    Args:
        package: whether the process can import the package.
        offline: with HF_HUB_OFFLINE=1.

    Raises:
        RuntimeError: the process failed; the message has its output.
    """
    environment = dict(environment) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    command = [python, "-c", code + FINISH]
    if package:
        environment["PYTHONPATH"] = str(ROOT)
    else:
        command = [python, "-I", "-c", WITHOUT_PACKAGE + code + FINISH]
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not found:
        raise RuntimeError(f"The client ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}")
    return json.loads(found[-1].removeprefix(RESULT))
