"""A headless Chromium driven over its own protocol (CDP through a pipe): what a page logs, asks for, and looks like."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def installed() -> str | None:
    """The path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a running Chromium. ``problems`` are its console's, ``requests`` all that it asked for."""

    def __init__(self, process: subprocess.Popen[bytes], ask: int, answer: int) -> None:
        self._process, self._ask, self._answer = process, ask, answer
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self.problems, self.requests, self._seen = list[str](), list[str](), list[str]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; events that come before its answer are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._answer, 1 << 16)
            if not part:
                raise RuntimeError("Chromium ended")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._seen.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str([a.get("value") for a in params["args"]]))
        elif method == "Log.entryAdded":
            self.problems.append(params["entry"]["text"])

    def open(self, path: Path, width: int = 1400, height: int = 900, dark: bool = False, script: bool = True) -> None:
        """Loads a file at that width, as a phone below 500."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self._seen.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._note(self._next())

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def mouse(self, kind: str, x: float, y: float, pressed: bool = False) -> None:
        """``mousePressed``, ``mouseMoved`` or ``mouseReleased`` at a point of the window."""
        button = "left" if pressed or kind != "mouseMoved" else "none"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=int(pressed), clickCount=1)

    def shot(self, path: Path, whole: bool = True) -> None:
        """A picture of the whole page, or of the window."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))


@contextlib.contextmanager
def browser(program: str) -> Iterator[Page]:
    """A Chromium with a profile of its own, ended afterwards."""
    home = tempfile.mkdtemp()
    to_browser, ask = os.pipe()
    answer, from_browser = os.pipe()

    def wire() -> None:
        os.dup2(to_browser, 103)
        os.dup2(from_browser, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    words = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", f"--user-data-dir={home}",
    )  # fmt: skip
    process = subprocess.Popen(
        [program, *words], preexec_fn=wire, close_fds=False, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    page = None
    try:
        page = Page(process, ask, answer)
        yield page
    finally:
        if page is not None:
            with contextlib.suppress(RuntimeError, OSError):
                page._session = None
                page.call("Browser.close")
        os.close(ask)
        os.close(answer)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(home, ignore_errors=True)
