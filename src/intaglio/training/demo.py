"""The five-minute demonstration: train, measure, show."""

import sys
import webbrowser
from pathlib import Path

from intaglio.history.run_folder import RunFolder
from intaglio.training.run import train


def demo(out: str | Path = "runs", quiet: bool = False) -> RunFolder:
    """Trains the recipe ``demo`` into ``out`` and opens its page where there is a screen."""
    folder = train("demo", ["--runs", str(out)], quiet=quiet)
    assert folder is not None
    page = (folder.report / "index.html").resolve()
    if sys.stdout.isatty():
        webbrowser.open(page.as_uri())
    print(f"Open {page}")
    return folder
