"""What a plan sends out when a limit is broken: a finding as JSON to a webhook or a command. No torch.

It is sent from threads of its own, and what cannot be sent is told and never stops a training.
"""

import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from intaglio.config.plan import Limit
from intaglio.health.finding import Finding
from intaglio.history.table import portable

WEBHOOK_SECONDS, COMMAND_SECONDS = 5, 60
LAST_WAIT = 10.0
"""Seconds that the end of a training waits for what is still being sent."""


class Notifier:
    """Sends findings of one run; ``failures`` says what could not be sent."""

    def __init__(self, run: Path):
        self.run = run
        self._sending: dict[threading.Thread, str] = {}
        self._failed: list[str] = []

    def send(self, limit: Limit, finding: Finding, step: int) -> None:
        """To the limit's webhook and command, where it has them; ``step`` is that of the look which found it."""
        text = f"{self.run.name}, step {step:,}: {finding.severity}: {finding.message}"  # what chats show of a message
        evidence = {name: portable(value) for name, value in finding.evidence.items()}
        plain = asdict(finding) | {"evidence": evidence}
        content = {"text": text, "run": str(self.run), "step": step, "finding": plain}
        body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        if limit.webhook:
            self._start(_post, address(limit), body, f"webhook of “{limit.claim}”")
        if limit.command:
            self._start(_run, limit.command, body, f"command of “{limit.claim}”")

    def failures(self) -> list[str]:
        """What could not be sent since this was asked last."""
        found, self._failed = self._failed, []
        return found

    def close(self, seconds: float = LAST_WAIT) -> list[str]:
        """Waits for what is being sent, and gives what could not be."""
        until = time.monotonic() + seconds
        for thread, what in self._sending.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self._failed.append(f"the {what} has not ended after {seconds:g} s, and was left alone")
        self._sending.clear()
        return self.failures()

    def _start(self, send: Callable[[str, bytes], None], where: str, body: bytes, what: str) -> None:
        def sent() -> None:
            try:
                send(where, body)
            except Exception as error:  # whatever happens out there is no reason to end a training
                self._failed.append(f"the {what} failed: {type(error).__name__}: {error}")

        thread = threading.Thread(target=sent, daemon=True)
        self._sending[thread] = what
        thread.start()


def address(limit: Limit) -> str:
    """The URL of a limit's webhook; ``$NAME`` keeps a secret one out of recipes and run folders."""
    return os.environ.get(limit.webhook[1:], "") if limit.webhook.startswith("$") else limit.webhook


def refuse_without_address(limits: Iterable[Limit]) -> None:
    """Raises a ``ValueError`` where the variable that shall hold a webhook's URL holds none."""
    for limit in limits:
        if limit.webhook and urlsplit(address(limit)).scheme not in ("http", "https"):
            raise ValueError(
                f"plan: the webhook of “{limit.claim}” is {limit.webhook}, and that variable holds no URL. "
                f"Set it: export {limit.webhook[1:]}=https://…"
            )


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS):
        pass


def _run(command: str, body: bytes) -> None:
    done = subprocess.run(command, shell=True, input=body, capture_output=True, timeout=COMMAND_SECONDS)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"exit code {done.returncode}" + (f", {said[-1][:200]}" if said else ""))
