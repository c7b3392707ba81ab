"""A real TensorBoard server on the loopback address, to be asked."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Ask = Callable[..., Any]

WAIT = 30.0  # seconds; a deadline, not a time that is measured


def soon(look: Callable[[], Any], what: str) -> Any:
    """Return the first answer that is not empty."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        if answer := look():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"not within {WAIT} s: {what}")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Ask]:
    """Start a server; give a function that asks it."""
    options = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    with tempfile.TemporaryDirectory() as place:
        said = Path(place) / "output.txt"
        with said.open("wb") as output:
            # A session of its own: the server starts another process, which has to go with it.
            server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def port() -> str | None:
            assert server.poll() is None, said.read_text()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", said.read_text())
            return found and found[1]

        def answer(path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
            url = f"http://127.0.0.1:{number}/data/{path}{'?' if query else ''}{urllib.parse.urlencode(query)}"
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with opener.open(request, timeout=WAIT) as response:
                raw = response.read()
                if response.headers.get("Content-Encoding") == "gzip":
                    raw = gzip.decompress(raw)
                return json.loads(raw) if "json" in response.headers["Content-Type"] else raw

        try:
            number = soon(port, "the address of the server")
            yield answer
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
