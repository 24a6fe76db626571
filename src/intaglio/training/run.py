"""One training run from a configuration to a run folder with a model, its proofs and its numbers."""

import logging
import math
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from intaglio import config as configuration
from intaglio.config import Config
from intaglio.data.batches import TrainingBatches, fixed_batches
from intaglio.data.prepare import Prepared, notices
from intaglio.health.diagnosis import load_profile
from intaglio.health.notify import refuse_without_address
from intaglio.health.plan import load_plan
from intaglio.history import HistoryWriter, run_folder
from intaglio.history.run_folder import RunFolder
from intaglio.models.saved import of_run
from intaglio.reports.page import write_page
from intaglio.systems.base import NonFiniteStep, System
from intaglio.systems.optimizers import describe_groups
from intaglio.training import checkpoint, device, launch
from intaglio.training.ema import EMA
from intaglio.training.finish import finish
from intaglio.training.health import Health
from intaglio.training.kinds import Kind, kind_of
from intaglio.training.loop import AfterStep
from intaglio.training.progress import ProgressReport


def train(
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    resume: str | Path | None = None,
    parent: str | Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    alter: Callable[[System], None] | None = None,
) -> RunFolder | None:
    """Trains a recipe, goes on with a run, or fine-tunes one; returns the run folder (None after a dry run).

    Args:
        recipe: name or path; not given with ``resume``, optional with ``parent``.
        overrides: ``--key.sub value`` words.
        resume: run folder or checkpoint file to go on with; only the length may change.
        parent: run whose model is fine-tuned with a fresh optimizer, at a tenth of its rate unless one is given.
        dry_run: prepares everything, goes forward and backward once, writes nothing.
        alter: changes the system before its first step; how the demo breaks its twin.

    Raises:
        ValueError: anything that the user can put right; says how.
    """
    say = _Teller(quiet or launch.rank() > 0)
    if resume is not None:
        if parent is not None or dry_run:
            raise ValueError("--resume goes on with a run as it is; leave --from and --dry-run out.")
        return _resume(resume, overrides, recipe, say)
    model = None
    source = run_folder.find(parent) if parent is not None else None
    if source is not None:
        config = configuration.load(recipe or source.path / "config.yaml", overrides)
        given = {word.split("=")[0] for word in overrides}
        if "--optim.rate" not in given:
            slower = [f"--optim.rate={config.optim.rate / 10}"]
            if "--optim.floor" not in given:
                slower.append(f"--optim.floor={config.optim.floor / 10}")
            config = configuration.load(recipe or source.path / "config.yaml", [*overrides, *slower])
            say(f"fine-tuning at a tenth of the rate: {config.optim.rate:g}; --optim.rate sets another")
        if source.record["system"] != config.system:
            raise ValueError(
                f"{source.path} is a run of {source.record['system']}, and {recipe} is a recipe of {config.system}: "
                f"fine-tune with its own recipe, intaglio train --from {source.path}"
            )
        model = of_run(source)
        kind_of(config).refuse_other_shape(model, source)
    elif recipe is None:
        raise ValueError(f"Which recipe? One of: {', '.join(configuration.recipes())}; or --resume RUN, --from RUN.")
    else:
        config = configuration.load(recipe, overrides)
    config, reasons = _resolve_machine(config)
    say(f"device {config.train.device} ({reasons['device']}), {config.train.precision} ({reasons['precision']})")
    load_profile(config.health.profile)  # refused now rather than after the data is read
    refuse_without_address(load_plan(config.plan))
    kind = kind_of(config)
    prepared = kind.prepare(None, model, _progress(say), say)
    config = kind.config = _resolve_length(kind.resolve(prepared), prepared)
    _tell_data(say, prepared, kind)
    if source is not None:
        _refuse_leak(source, config, prepared)
    _batches(config, prepared, 0)  # refuses a batch that the items cannot fill
    if dry_run:
        _one_step(kind, prepared, model, say)
        return None
    folder = None
    if launch.rank() == 0:
        folder = run_folder.create(config, sys.argv, source.record["id"] if source else None)
        folder.update(data=prepared.record, fingerprint=prepared.fingerprint, machine_choice=reasons)
        if source is not None:
            apart = configuration.diff(source.config(), config)
            folder.update(changed_from_parent=[key for key in apart if key not in ("name", "runs", "plan")])
        for notice in notices(prepared):
            folder.notice(notice)
        say(f"run folder {folder.path}")
    return _fit(kind, prepared, folder, None, model, say, alter, source)


def _resume(path: str | Path, overrides: Sequence[str], recipe: str | Path | None, say: "_Teller") -> RunFolder:
    if recipe is not None:
        raise ValueError(
            f"--resume goes on with the run's own configuration: leave the recipe {recipe} out. To train a run's model "
            f"with another recipe: intaglio train {recipe} --from {path}"
        )
    given = Path(path)
    folder = run_folder.find(given.parent.parent if given.suffix == ".ckpt" else given)
    source = given if given.suffix == ".ckpt" else checkpoint.newest(folder.checkpoints)
    content = checkpoint.read(source)
    saved = {**content["intaglio"], "state_dict": content["state_dict"]}
    old = folder.config()
    config = configuration.load(folder.path / "config.yaml", overrides)
    checkpoint.refuse_other_recipe(old, config, folder.path)
    refuse_without_address(load_plan(config.plan))
    config, _ = _resolve_machine(config)
    kind = kind_of(config)
    prepared = kind.prepare(saved, None, _progress(say), say)
    if prepared.fingerprint != saved["fingerprint"]:
        raise ValueError(
            f"The data of {folder.path} has changed since the checkpoint ({config.data.source}: other images, captions "
            f"or split). Put the data back, or fine-tune on the new data with --from {folder.path}."
        )
    config = kind.config = _resolve_length(kind.resolve(prepared), prepared)
    if (config.train.steps or 0) < int(content["global_step"]):
        raise ValueError(f"{source} is past {config.train.steps} steps already; --resume can only make a run longer.")
    if launch.rank() == 0:
        folder.save_config(config)
        resumed = [*folder.record.get("resumed", []), {"from": source.name, "command": sys.argv}]
        folder.update(status="running", stopped_by=None, error=None, resumed=resumed)
        unfinished = folder.checkpoints.glob(".*.part")  # what a killed process was writing
        later = [p for p in folder.checkpoints.glob("step-*.ckpt") if p.name > source.name]  # as the history's rows
        if later:
            say(f"dropping what came after {source.name}: {', '.join(p.name for p in sorted(later))}", always=True)
        for file in [*unfinished, *later]:
            file.unlink()
    say(f"resuming {folder.path} from {source.name}")
    return _fit(kind, prepared, folder if launch.rank() == 0 else None, source, None, say)


def branch(start: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> RunFolder:
    """A new run that goes on from a checkpoint of another, which stays as it is, with other settings.

    Weights, optimizer, position in the data and everything else are the checkpoint's; its history is copied up to it.

    Args:
        start: checkpoint file.
        overrides: ``--key.sub value`` words; what is ``config.structural`` may not change.

    Raises:
        ValueError: a setting that the checkpoint does not fit, or data that have changed.
    """
    say = _Teller(quiet or launch.rank() > 0)
    source = Path(start)
    parent = run_folder.find(source.parent.parent)
    content = checkpoint.read(source)
    saved = {**content["intaglio"], "state_dict": content["state_dict"]}
    config = configuration.load(parent.path / "config.yaml", overrides)
    changed = configuration.diff(parent.config(), config)
    if fixed := [key for key in changed if configuration.structural(key)]:
        raise ValueError(f"{source} does not fit another {', '.join(fixed)}: train anew with it.")
    config, reasons = _resolve_machine(config)
    kind = kind_of(config)
    prepared = kind.prepare(saved, None, _progress(say), say)
    if prepared.fingerprint != saved["fingerprint"]:
        raise ValueError(f"The data of {parent.path} has changed since {source.name}: put it back.")
    kind.config = config = _resolve_length(kind.resolve(prepared), prepared)
    step = int(content["global_step"])
    if (config.train.steps or 0) <= step:
        raise ValueError(f"{source} is at step {step}: give --train.steps more than that.")
    folder = None
    if launch.rank() == 0:
        folder = run_folder.create(config, sys.argv, parent.record["id"])
        keys = [key for key in changed if key not in ("name", "runs", "plan")]
        folder.update(data=prepared.record, fingerprint=prepared.fingerprint, machine_choice=reasons)
        folder.update(changed_from_parent=keys, branched_at=step)
        if parent.metrics.is_file():
            shutil.copy(parent.metrics, folder.metrics)
        say(f"run folder {folder.path}, from step {step} of {parent.path}")
    return _fit(kind, prepared, folder, source, None, say)


def _fit(
    kind: Kind,
    prepared: Prepared,
    folder: RunFolder | None,
    source: Path | None,
    model: Any,
    say: "_Teller",
    alter: Callable[[System], None] | None = None,
    parent: RunFolder | None = None,
) -> RunFolder:
    """Trains, then measures and writes; leaves ``run.json`` saying how it ended whatever happens."""
    config = kind.config
    system = kind.build(prepared, model)
    if parent is not None and folder is not None:
        folder.update(loaded=checkpoint.taken_over(system.model, parent.whole_model()))
    if alter is not None:
        alter(system)
    for line in describe_groups(system.configure_optimizers()["optimizer"].param_groups):
        say(line)
    begun = time.monotonic()
    done = int(checkpoint.read(source)["global_step"]) if source else 0
    try:
        after = _run_trainer(kind, prepared, system, folder, source, done, say)
        if dist.is_initialized():
            dist.destroy_process_group()
        if folder is None:  # not the first process: the first one writes
            raise SystemExit(0)
        seconds = folder.record.get("train_seconds", 0.0) + time.monotonic() - begun
        folder.update(train_seconds=round(seconds, 1), step=after.done)
        if after.stopped_by and after.stopped_by.startswith("signal"):
            folder.update(status="interrupted", stopped_by=after.stopped_by.removeprefix("signal "))
            say(f"Stopped by {after.stopped_by} after step {after.done}; everything is saved.", always=True)
            say(f"Go on with: intaglio train --resume {folder.path}", always=True)
            return folder
        if after.stopped_by and after.stopped_by.startswith("health"):
            folder.update(status="stopped", stopped_by=after.stopped_by)
            page = write_page(folder)
            say(f"Stopped by {after.stopped_by} after step {after.done}: {page}", always=True)
            return folder
        step = after.done
        if config.train.patience and after.best_step != step:
            step, notice = after.take_best(system)
            folder.notice(notice)
        if after.ema:
            after.ema.apply_for_good(system)
        if after.stopped_by:
            folder.notice(after.stopped_by)
        system.to("cuda" if config.train.device == "cuda" else "cpu")  # Lightning has moved it to the CPU
        with _ended_by_sigterm():
            finish(kind, folder, system.model, prepared, step, say)  # type: ignore[arg-type]  # one of ours
        folder.update(status="finished", stopped_by=None, best_step=after.best_step)
    except torch.OutOfMemoryError as error:
        told = torch.OutOfMemoryError(_what_fits(config, error))
        if folder is not None:
            _record_end(folder, told, say)
        raise told from error
    except BaseException as error:
        if folder is not None:
            _record_end(folder, error, say)
            if isinstance(error, NonFiniteStep):
                error.run = folder.path
        raise
    return folder


def _what_fits(config: Config, error: torch.OutOfMemoryError) -> str:
    """The smaller batch that takes the same optimizer steps."""
    train, said = config.train, str(error).splitlines()[0][:200]
    if train.batch_size < 2 * train.devices:
        return f"Out of memory with batches of {train.batch_size} ({said}). Use a smaller model or image size."
    half = train.batch_size // 2 // train.devices * train.devices
    return (
        f"Out of memory with batches of {train.batch_size} ({said}). Half of it in two passes takes the same steps: "
        f"--train.batch_size {half} --train.accumulate {2 * train.accumulate}; intaglio check estimates what fits."
    )


def _record_end(folder: RunFolder, error: BaseException, say: "_Teller") -> None:
    """Leaves in ``run.json`` why a run ended unfinished; after a signal, says how to go on."""
    signalled = {"KeyboardInterrupt": "SIGINT", "SystemExit": "SIGTERM"}.get(type(error).__name__)
    with suppress(OSError):  # on a full disk the first error is the one to tell
        if signalled is None:
            folder.update(status="failed", error=f"{type(error).__name__}: {error}")
            return
        folder.update(status="interrupted", stopped_by=signalled)
    saved = sorted(folder.checkpoints.glob("step-*.ckpt"))
    how = f"Go on with: intaglio train --resume {folder.path}" if saved else "Nothing was saved yet."
    say(f"Stopped by signal {signalled}. {how}", always=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process as an exception does, with its exit code 143."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_trainer(
    kind: Kind,
    prepared: Prepared,
    system: System,
    folder: RunFolder | None,
    source: Path | None,
    done: int,
    say: "_Teller",
) -> AfterStep:
    config = kind.config
    train, world, launched = config.train, config.train.devices, launch.launched()
    nodes = launched.nodes if launched else 1
    batches = _batches(config, prepared, done)
    held_out = prepared.some("val", train.validate_items)

    def look() -> Iterator[Any]:  # whole batches to each process, so that any number of them measures the same
        return islice(fixed_batches(prepared.data, held_out, train.batch_size), launch.rank(), None, world)

    def prove(system: System, step: int) -> None:
        assert folder is not None
        kind.prove(system.model, prepared, folder.proofs(step), quick=True)

    history = HistoryWriter(folder.metrics) if folder is not None else None
    if history:
        history.truncate_after(done)
    identity = {
        "format": checkpoint.FORMAT,
        "config": configuration.to_dict(config),
        "fingerprint": prepared.fingerprint,
        **kind.saved(prepared),
    }
    ema = EMA(train.ema) if train.ema > 0 else None
    where = folder.checkpoints if folder is not None else Path(config.runs)
    items = len(prepared.splits["train"])
    health = None
    if folder is not None and config.health.on:

        def probe() -> Any:
            items = prepared.some("val", config.health.probe)
            return next(fixed_batches(prepared.data, items, len(items)))

        health = Health(config, folder, probe, system.bf16, say)
    after = AfterStep(config, history, where, batches, items, look, ema, prove if folder else None, identity, health)
    bar = ProgressReport(after, train.batch_size * train.accumulate, train.monitor, say.quiet, say.console)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    trainer = L.Trainer(
        accelerator="gpu" if train.device == "cuda" else "cpu",
        devices=world // nodes,
        num_nodes=nodes,
        strategy=_strategy(world, system),
        precision="bf16-mixed" if train.precision == "bf16" else "32-true",
        max_steps=train.steps or -1,
        min_epochs=0,
        accumulate_grad_batches=train.accumulate,
        limit_val_batches=0,
        logger=TensorBoardLogger(folder.path, name="", version="tensorboard") if folder is not None else False,
        callbacks=[c for c in (ema, after, bar) if c is not None],
        plugins=[checkpoint.AtomicIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():  # of Lightning's calls into a newer torch, which nobody here can change
        for about in ("`isinstance.treespec, LeafSpec.`", "`broadcast_buffers`"):
            warnings.filterwarnings("ignore", f"{about} is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # frozen ones stay as they are
        try:
            trainer.fit(system, train_dataloaders=batches, ckpt_path=source)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise stop.__context__ or stop from None
    after.done = trainer.global_step
    if history:
        history.close()
    if health:
        health.close()
    return after


def _strategy(world: int, system: System) -> Any:
    """Of several processes; parts that a stage freezes have no gradient to wait for."""
    if world == 1:
        return "auto"
    return DDPStrategy(broadcast_buffers=False, find_unused_parameters=system.freezes)


def _batches(config: Config, prepared: Prepared, done: int) -> TrainingBatches:
    """This process's training batches after ``done`` optimizer steps."""
    train = config.train
    seed, start = train.drawn_by(config.seed), done * train.accumulate
    places = {"rank": launch.rank(), "world": train.devices}
    return TrainingBatches(prepared.data, prepared.splits["train"], seed, train.batch_size, start, **places)


def _resolve_machine(config: Config) -> tuple[Config, dict[str, str]]:
    train, devices = launch.follow(config.train)
    choice = device.choose(train)
    train = replace(train, device=choice.device, precision=choice.precision)  # type: ignore[arg-type]
    reasons = {"device": choice.device_reason, "devices": devices, "precision": choice.precision_reason}
    return replace(config, train=train), reasons


def _resolve_length(config: Config, prepared: Prepared) -> Config:
    """Steps from epochs, and looks and checkpoints from steps."""
    train = config.train
    per_step = train.batch_size * train.accumulate
    steps = train.steps or math.ceil((train.epochs or 0) * len(prepared.splits["train"]) / per_step)
    every = train.validate_every or max(1, math.ceil(steps / 10))
    train = replace(train, steps=steps, epochs=None, validate_every=every)
    train = replace(train, checkpoint_every=train.checkpoint_every or every)
    return replace(config, train=train)


def _refuse_leak(source: RunFolder, config: Config, prepared: Prepared) -> None:
    """On the same data a fine-tuned model must have the same held-out items, or it has been trained on some of them."""
    theirs, ours = source.config().data.source, config.data.source
    same = theirs == ours or ("engravings" not in (theirs, ours) and Path(theirs).resolve() == Path(ours).resolve())
    if same and prepared.fingerprint != source.record["fingerprint"]:
        raise ValueError(
            f"{source.path} was trained on {ours} with another split or other files, so items held out now may have "
            f"been trained on then. Keep its --seed ({source.record['seed']}), its --data settings and its files, or "
            "fine-tune on other data with --data.source."
        )


def _progress(say: "_Teller") -> Callable[[int, int], None]:
    """A line every few seconds while images are decoded for the first time."""
    told = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal told
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"decoding images, once for all runs: {done:,} of {of:,}")

    return progress


def _tell_data(say: "_Teller", prepared: Prepared, kind: Kind) -> None:
    sides = ", ".join(f"{len(items):,} {side}" for side, items in prepared.splits.items())
    say(f"data {prepared.corpus.describe()}")
    say(f"{sides} items, {kind.describe(prepared)}")
    for notice in notices(prepared):
        say(f"note: {notice}")


def _one_step(kind: Kind, prepared: Prepared, model: Any, say: "_Teller") -> None:
    """One pass forward and backward: shows that data, model and loss fit together."""
    config, system = kind.config, kind.build(prepared, model)
    train = config.train
    system.to("cuda" if train.device == "cuda" else "cpu")
    batch = system.transfer_batch_to_device(next(iter(_batches(config, prepared, 0))), system.device, 0)
    begun = time.perf_counter()
    with torch.autocast(system.device.type, torch.bfloat16, enabled=system.bf16):
        terms = system.loss_terms(batch)
    total = system.weigh(terms)
    total.backward()
    seconds = time.perf_counter() - begun
    for name, term in terms.items():
        say(f"{name}: {float(term.value.detach()):.4f} × {term.weight:g}", always=True)
    minutes = seconds * (train.steps or 0) * train.accumulate / 60
    say(
        f"total {float(total.detach()):.4f}; the first step took {seconds:.2f} s, so at most {minutes:.0f} min",
        always=True,
    )


class _Teller:
    """Says what a person should know; nothing when quiet, except what must be said."""

    def __init__(self, quiet: bool):
        self.quiet, self.console = quiet, Console(highlight=False, stderr=True)

    def __call__(self, text: str, always: bool = False) -> None:
        if always or not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)
