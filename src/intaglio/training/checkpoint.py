"""Checkpoints that are whole or absent: written beside, forced to disk, renamed; read without pickled code.

A checkpoint holds what Lightning keeps (model, optimizer, scheduler, loops, callbacks, EMA among them) and, under
``intaglio``, the format version, configuration, data position, data fingerprint and tokenizer. Randomness needs no
state: every draw is a function of (seed, rank, step).
"""

import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors.torch import load_file
from torch import nn

from intaglio import config as configuration
from intaglio.config import Config

FORMAT = 1

RESUMABLE = (
    "train.steps", "train.epochs", "train.keep", "train.patience", "train.log_every", "train.device", "plan",
    "health.stop",
)  # fmt: skip
"""Keys that may change when a run goes on; any other makes another run, which ``--from`` starts."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class AtomicIO(TorchCheckpointIO):
    """Lightning's file access, atomic and without pickled code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            earlier = sorted(p.name for p in path.parent.glob("step-*.ckpt"))
            kept = f"{earlier[-1]} is whole and can be resumed from" if earlier else "no earlier checkpoint exists"
            raise CheckpointError(
                f"Cannot write the checkpoint {path}: {str(error).splitlines()[0]}. {kept}. "
                f"Free some disk space, then: intaglio train --resume {path.parent.parent}"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        CheckpointError: it is missing, cut short, holds code, or is of another program or format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint at {path}.") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds objects that are not weights and numbers, which could run code when loaded; it was not "
            "loaded. Checkpoints that intaglio wrote never do: get the file from its author again, as safetensors."
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        others = [p.name for p in sorted(path.parent.glob("step-*.ckpt")) if p != path]
        hint = f" Earlier: {', '.join(others)}; give one to --resume by its path." if others else ""
        raise CheckpointError(
            f"{path} is cut short or damaged ({str(error).splitlines()[0][:120] if str(error) else 'empty'}).{hint}"
        ) from None
    ours = content.get("intaglio") if isinstance(content, dict) else None
    if ours is None:
        raise CheckpointError(f"{path} is not a checkpoint of intaglio. Start a run with: intaglio train RECIPE")
    if ours["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {ours['format']}; this version reads format {FORMAT}. Use the version of "
            "intaglio that wrote it (run.json names it)."
        )
    return content


def newest(folder: Path) -> Path:
    """The checkpoint of the highest step in ``checkpoints/``.

    Raises:
        CheckpointError: there is none.
    """
    found = sorted(folder.glob("step-*.ckpt"))
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint yet, so there is nothing to resume; train anew.")
    return found[-1]


def refuse_other_recipe(old: Config, new: Config, where: Path) -> None:
    """A resumed run may be extended, not changed.

    Raises:
        CheckpointError: other keys differ; names them.
    """
    changed = {k: v for k, v in configuration.diff(old, new).items() if k not in RESUMABLE}
    if changed:
        listed = ", ".join(f"{k}: {a!r} -> {b!r}" for k, (a, b) in changed.items())
        raise CheckpointError(
            f"{where} was trained with another configuration ({listed}). To go on with a changed one use --from "
            f"{where}, which starts a fresh optimizer; --resume changes only {', '.join(RESUMABLE)}."
        )


def taken_over(model: nn.Module, saved: Path) -> dict[str, list[str]]:
    """What a model that is to go on learning lacks of a saved one, as the fact ``loaded`` of partial-load: tensors that
    are not what was saved, that it does not have, and of another shape."""
    state, kept = model.state_dict(), load_file(saved / "model.safetensors")
    common = {n: t for n, t in kept.items() if n in state}
    same_shape = {n: t for n, t in common.items() if state[n].shape == t.shape}
    return {
        "missing": [n for n, t in same_shape.items() if not torch.equal(state[n].cpu(), t)],
        "unexpected": [n for n in kept if n not in state],
        "reshaped": [n for n in common if n not in same_shape],
    }


def name(step: int) -> str:
    """File name of the checkpoint after an optimizer step."""
    return f"step-{step:08d}.ckpt"
