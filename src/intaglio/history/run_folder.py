"""The run folder: the single record of a run, that every command reads. No torch here.

runs/<name>/  run.json  config.yaml  metrics.jsonl → metrics.parquet  findings.json  evaluation.json  notes.md
              checkpoints/  model/  proofs/step-000500/*.png  report/  tensorboard/
"""

import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from intaglio import config as configuration
from intaglio.config import Config


@dataclass(frozen=True)
class RunFolder:
    """Paths and record of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def whole_model(self) -> Path:
        """``model/`` of a run that has finished.

        Raises:
            ValueError: it has not.
        """
        if not (self.model / "config.json").is_file():
            raise ValueError(
                f"{self.path} has no model yet (status: {self.record['status']}); it is written when training ends. "
                f"Finish it with: intaglio train --resume {self.path}"
            )
        return self.model

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def proofs(self, step: int) -> Path:
        """Folder of the pictures made at an optimizer step."""
        return self.path / "proofs" / f"step-{step:06d}"

    @property
    def record(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        return json.loads((self.path / "run.json").read_text(encoding="utf-8"))

    def update(self, **changes: Any) -> None:
        """Writes changes into ``run.json``, atomically."""
        path = self.path / "run.json"
        record = (self.record if path.is_file() else {}) | changes
        write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def notice(self, what: str) -> None:
        """Records something that a reader must know: a fallback, a cut, a replacement."""
        self.update(notices=[*self.record.get("notices", []), what])

    def config(self) -> Config:
        """The resolved configuration that the run was trained with."""
        return configuration.load(self.path / "config.yaml")

    def save_config(self, config: Config) -> None:
        """Writes ``config.yaml``."""
        write_atomically(self.path / "config.yaml", configuration.dump(config))


def create(config: Config, command: list[str], parent: str | None = None) -> RunFolder:
    """A new folder ``runs/<name>``, or ``<name>-2`` and so on where that name is taken."""
    root = Path(config.runs)
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        path = root / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            path.mkdir()
            break
        except FileExistsError:
            continue
    folder = RunFolder(path)
    folder.checkpoints.mkdir()
    folder.save_config(config)
    (path / "notes.md").write_text(f"# {path.name}\n\n", encoding="utf-8")
    folder.update(
        id=uuid.uuid4().hex[:12],
        name=path.name,
        system=config.system,
        parent=parent,
        command=command,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=config.seed,
        versions=_versions(),
        git_commit=_git_commit(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        status="running",
        notices=[],
    )
    return folder


def find(path: str | Path) -> RunFolder:
    """The run folder at ``path``, or of that name under ``runs/``.

    Raises:
        ValueError: there is none; names the nearest.
    """
    for candidate in (Path(path), Path("runs") / path):
        if (candidate / "run.json").is_file():
            return RunFolder(candidate)
    known = sorted(p.parent.name for p in Path("runs").glob("*/run.json"))
    hint = f" Runs here: {', '.join(known[-8:])}." if known else " There are no runs under runs/ yet."
    raise ValueError(f"{path} is not a run folder: it needs run.json.{hint}")


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, whatever happens in between."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("intaglio", "torch", "lightning", "numpy", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _git_commit() -> Mapping[str, Any] | None:
    """Commit and cleanliness of the working directory's repository, or None where it is in none."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "clean": not status.stdout.strip()}
