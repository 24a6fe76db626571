"""A monitor for anybody's training loop: readings, audits and a verdict, from outside.

    monitor = Monitor(model, optimizer, folder="runs/mine", taps={"latent": "encoder"}, probe=held_out_images)
    for batch in loader:
        loss = ...
        optimizer.zero_grad(); loss.backward()
        monitor.step({"reconstruction": rec, "kl": (kl, 0.1)}, batch=batch)   # between backward and the update
        optimizer.step()
    monitor.close()

It draws from no global generator, keeps no gradient, and changes no weight, buffer or mode: the run is bit-identical to
one without it. ``intaglio diagnose runs/mine`` reads what it wrote.
"""

import difflib
import inspect
import json
import math
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from intaglio.health import audits, panel
from intaglio.health.diagnosis import Diagnosis, diagnose, facts_of, load_profile, write_findings
from intaglio.health.finding import Finding
from intaglio.health.notify import Notifier
from intaglio.health.plan import load_plan
from intaglio.health.record import Growing, Record
from intaglio.health.rules import all_rules
from intaglio.history import HistoryWriter, Measured, NotMeasured, Reading
from intaglio.history.run_folder import RunFolder, write_atomically

Loss = Tensor | float | tuple[Tensor | float, float]
"""A term, or a term with the weight that multiplied it."""

AUDITED = 3
"""Steps in which gradients are watched before a tensor without one is called dead."""


class Stopped(RuntimeError):
    """Training must not go on; the message says why, and ``finding`` what was seen."""

    def __init__(self, finding: Finding, kept: str = ""):
        super().__init__(finding.message + kept)
        self.finding = finding


class Monitor:
    """Watches a training.

    Args:
        model: what is trained.
        optimizer: what holds its parameters; audits of groups and rates are not measured without.
        folder: gets ``run.json``, ``metrics.jsonl``, ``audits.json`` and ``findings.json``; must be new or empty.
        taps: by site name, the path of a module whose output is a latent, as ``{"latent": "encoder.out"}``; of a
            sequence (N, T, d) the mean over T is taken, of a map (N, d, H, W) all of it.
        probe: a fixed held-out batch, on the model's device, that ``forward`` runs the model on.
        forward: how, given model and probe; by default ``model(probe)``.
        read: instruments and trials of your own on model and probe, as ``{"val/codes": {"perplexity": reading}}``.
        every: steps between looks at the probe.
        log_every: steps between rows of losses.
        steps: how long the run is meant to be, where that is known.
        profile: limits of the rules: ``default``, ``documents``, or a YAML file.
        plan: limits of your own, as a YAML file or its lines; see docs/plans.md.
        nulls: what a quantity is where nothing has been learnt, by its name, as ``val/loss/total``, or by that of a
            loss, as ``total``, in training and on held-out items.
        on_finding: called with each new finding.
        stop: raises ``Stopped`` at the first failing finding.
        start: optimizer steps made before, where training goes on from a checkpoint.
        scaled: a ``GradScaler`` skips steps whose gradient is not finite, so that only losses are refused here.

    Raises:
        ValueError: a tap that the model does not have, with the nearest; a model that cannot be called on the probe; a
            folder that holds a run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        folder: str | Path,
        taps: Mapping[str, str] | None = None,
        probe: Any = None,
        forward: Callable[[Any, Any], Any] | None = None,
        read: Callable[[Any, Any], Mapping[str, Mapping[str, Measured]]] | None = None,
        every: int = 500,
        log_every: int = 20,
        steps: int | None = None,
        profile: str | Path = "default",
        plan: str | Path | Sequence[Mapping[str, Any]] = (),
        nulls: Mapping[str, float] | None = None,
        on_finding: Callable[[Finding], None] | None = None,
        stop: bool = False,
        start: int = 0,
        scaled: bool = False,
    ):
        model = _inner(model)
        self.model, self.optimizer, self.probe, self.scaled = model, optimizer, probe, scaled
        self.forward, self.read = forward or (lambda m, batch: m(batch)), read
        self.every, self.log_every, self.steps, self.stop = every, log_every, steps, stop
        self.nulls, self.on_finding = _nulls(nulls or {}), on_finding
        self.profile, self.plan = load_profile(profile), load_plan(plan)
        for limit in self.plan:
            if limit.checkpoint:
                raise ValueError(f"{limit.claim}: a monitor keeps no checkpoints; save yours in on_finding.")
        self.taps = {site: _module(model, path) for site, path in (taps or {}).items()}
        self.missing: dict[str, str] = {}
        self._try_probe()
        self.folder = _new_folder(Path(folder), steps)
        self.notifier = Notifier(self.folder.path)
        self.history = HistoryWriter(self.folder.metrics)
        self.count = self.start = start
        self.terms: Collection[str] = ()
        self.growing = Growing()
        self._parameters = list(model.parameters())
        self.silence, self.leftovers = audits.Silence(), audits.Leftovers()
        self.facts: dict[str, Any] = audits.parameters(model)
        self._before = audits.fingerprints(model)
        self._told: set[tuple[str, str]] = set()
        self.validations, self._muted, self._audited = 0, False, False
        if optimizer is not None:
            self.facts["not_in_optimizer"] = audits.not_in_optimizer(model, optimizer)

    def step(self, losses: Loss | Mapping[str, Loss], batch: Any = None, clipped: bool = False) -> None:
        """Between ``backward()`` and the update. ``losses`` is the total, or its terms with their weights, or both.

        ``clipped`` gradients are checked, but their norm, which says nothing, is not logged.

        Raises:
            Stopped: loss or gradient is not finite, so the update is not made, and ``batch`` is kept in the folder with
                the weights as they are; or a rule fails and ``stop`` was asked for.
        """
        self.count += 1
        pairs = _weighed(losses)
        row = self.count % self.log_every == 0 or self.count == self.start + 1
        gradients = [g for p in self._parameters if p.requires_grad and (g := p.grad) is not None]
        parts = [(_square if row else _sum)(g) for g in gradients]
        *numbers, whole = _numbers([value for value, _ in pairs.values()], parts)
        if not math.isfinite(sum(numbers)) or not (self.scaled or math.isfinite(whole)):
            norm = math.sqrt(_numbers([], [_square(g) for g in gradients])[0])
            self._refuse(_named(pairs, numbers), norm, batch)
        self._audit(row, muted=any(weight == 0 for _, weight in pairs.values()))
        if row:
            self.terms, values = pairs.keys(), _named(pairs, numbers)
            rows = {f"train/loss/{name}": value for name, value in values.items()}
            rows |= {f"train/weight/{name}": pairs[name][1] for name in values if name != "total"}
            rows |= {} if clipped else {"train/optimizer/gradient_norm": math.sqrt(whole)}
            if self.optimizer is not None:
                rows["train/optimizer/rate"] = float(self.optimizer.param_groups[0]["lr"])
            self._write(rows)
        if self._due(self.count):
            self.look()

    def before_backward(self, losses: Mapping[str, Loss]) -> None:
        """Before ``backward()``, if you like: at each look, norm, share and cosine of each term's gradient.

        ``losses`` are the terms with their weights, without their total.
        """
        if not self._due(self.count + 1):
            return
        weighted = {name: weight * value for name, (value, weight) in _weighed(losses).items() if weight}
        found = panel.Panel({}, {})
        graphs = {name: value for name, value in weighted.items() if isinstance(value, Tensor)}
        for name, measured in panel.terms(graphs, self.model).items():
            found.add(f"train/term.{name}", measured)
        self._write(found.readings, self.count + 1)

    def audit(self, **facts: Any) -> None:
        """What an audit found, as ``audit(augmentations={"flip": audits.augmentation(flip, images)})``.

        Raises:
            ValueError: a fact that no rule reads, with the nearest.
        """
        known = sorted({name for r in all_rules() for name in r.facts} | {"parameters"})
        for name in facts:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1) or known
                raise ValueError(f"No rule reads the fact {name!r}; nearest: {', '.join(near)}.")
        self.facts |= facts
        self._write_facts()

    def look(self) -> Diagnosis:
        """Reads the probe at every tap, and judges; called by ``step``, and whenever you like."""
        self._parameters = list(self.model.parameters())  # some may have been added, or thawed
        if self._audited:
            self._tell_dead()
        if self.optimizer is not None:
            self.facts["not_in_optimizer"] = audits.not_in_optimizer(self.model, self.optimizer)
        found = panel.Panel({}, {})
        if self.taps and self.probe is not None:
            for site, output in self._tapped().items():
                try:
                    found.add(f"val/{site}", panel.latents(output))
                except ValueError as error:
                    found.missing[f"val/{site}"] = str(error)
        if self.read:
            with self._probing():
                for site, measured in self.read(self.model, self.probe).items():
                    found.add(site, measured)
        self._write({**found.readings, **{name: NotMeasured(why) for name, why in found.missing.items()}})
        return self.judge()

    def log(self, numbers: Mapping[str, float | Measured], split: str = "train") -> None:
        """Numbers of your own at the present step, by full name (``val/loss/caption``) or, as losses, by their own.

        A term that ``step`` was given, and ``val_loss`` or the like, is a loss; the rest is filed under ``logged``.
        """
        self._write({_full(name, split, self.terms): value for name, value in numbers.items()})

    def validated(self, numbers: Mapping[str, float | Measured]) -> None:
        """``log`` for held-out numbers."""
        self.log(numbers, "val")

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Around a look at held-out items: finds what the first, second, fourth, eighth … of them changes."""
        self.validations += 1
        if self.validations & (self.validations - 1):
            yield
            return
        found: dict[str, Any] = {}
        dropping = {name for name, m in self.model.named_modules() if audits.drops(m)}
        with audits.around_validation(self.model, found), audits.called_in_training_mode(self.model) as called:
            yield
        found["training_in_validation"] = sorted(called if found["changed_by_validation"] else called & dropping)
        for name, now in found.items():
            self.facts[name] = list(dict.fromkeys([*self.facts.get(name, ()), *now]))
        self._write_facts()

    def judge(self) -> Diagnosis:
        """The verdict on what is known; writes ``findings.json``, tells what is new, and stops if asked to."""
        self.history.flush()
        diagnosis = self._diagnosis()
        write_findings(self.folder, diagnosis)
        limits = {limit.id: limit for limit in self.plan}
        for finding in diagnosis.findings:
            limit = limits.get(finding.rule)
            if (finding.rule, finding.severity) not in self._told:
                self._told.add((finding.rule, finding.severity))
                if self.on_finding:
                    self.on_finding(finding)
                if limit:
                    self.notifier.send(limit, finding, self.count)
                if (self.stop and finding.severity == "fail") or (limit and limit.stop):
                    self.folder.update(status="stopped", stopped_by=finding.rule)
                    raise Stopped(finding)
        return diagnosis

    def close(self) -> Diagnosis:
        """The last verdict; closes the history."""
        if self._audited:
            self._tell_dead(over=True)
        self.leftovers.end()
        self._write_facts()
        diagnosis = self.judge()
        self.history.close()
        self.folder.update(status="finished", step=self.count, notices=self.notifier.close())
        return diagnosis

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.history.close()

    def _diagnosis(self) -> Diagnosis:
        facts = facts_of(self.folder) | self.facts
        running = self.folder.record["status"] == "running"
        record = Record(self.growing.series(), facts, {}, self.steps, running)
        return diagnose(record, self.profile, not_measured=self.missing, plan=self.plan)

    def _due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.start + AUDITED + 1

    def _refuse(self, losses: Mapping[str, float], norm: float, batch: Any) -> NoReturn:
        file = self.folder.path / f"non-finite-step-{self.count}.pt"
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer and self.optimizer.state_dict()}
        try:
            torch.save({"batch": batch, **state}, file)
            kept = f" The batch is in {file}."
        except Exception as error:  # a batch that cannot be pickled must not hide what was found
            torch.save({"batch": None, **state}, file)
            kept = f" The weights are in {file}; the batch could not be kept ({type(error).__name__}: {error})."
        told = ", ".join(f"{name} {value:.4g}" for name, value in {**losses, "gradient norm": norm}.items())
        message = f"Step {self.count}: {told}. The update was not made."
        finding = Finding("non-finite", "fail", message, {"step": self.count}, step=self.count)
        rows = {f"train/loss/{name}": value for name, value in losses.items()}
        self._write(rows | {"train/optimizer/gradient_norm": norm})
        self.history.flush()
        self.folder.update(status="stopped", stopped_by="non-finite")
        write_findings(self.folder, self._diagnosis())
        if self.on_finding:
            self.on_finding(finding)
        raise Stopped(finding, kept)

    def _audit(self, row: bool, muted: bool) -> None:
        """Watches gradients in the first steps, and those of tensors that had none from then on at each row.

        What was never called is told when the first steps are over, what had zeros at the first look: a floor, a gate
        or a weight of 0 may hold it back for a while.
        """
        first = self.count <= self.start + AUDITED
        if first:
            self.leftovers.look(self._parameters)
        if first or (row and self.silence.silent):
            self.silence.look(self.model)
        self._muted = muted and self.count < self.start + (self.steps or math.inf) / 2
        if not first and not self._audited:
            self._audited = True
            self.facts |= self.leftovers.end() | {"moving_targets": audits.moving(self.model, self._before)}
            self._tell_dead()

    def _tell_dead(self, over: bool = False) -> None:
        early = not over and self.count < self.start + self.every
        dead = {} if self._muted and not over else self.silence.by_module(absent=early)
        if dead and not self.facts.get("dead_parameters"):
            self.facts["dead_told_at"] = self.count
        self.facts["dead_parameters"] = dead
        if self.optimizer is not None:
            silent = self.silence.silent or set()
            still = audits.unmoved(self.model, self._before, self.optimizer)
            self._before = {n: d for n, d in self._before.items() if n in still or n in silent}
            self.facts["unmoved"] = [n for n in still if n not in silent and not early]
        self._write_facts()

    def _try_probe(self) -> None:
        """Once, before training: what fails on the probe fails now."""
        if self.probe is None or not self.taps:
            return
        try:
            self._tapped()
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} could not be run on the probe ({type(error).__name__}: {error}). Give a "
                "probe like the batches that it is trained on, and say how to run it: "
                "forward=lambda model, probe: model.encoder(probe)."
            ) from error

    def _tapped(self) -> dict[str, Tensor]:
        """The output (N, d) of each tapped module on the probe; several calls are put one after another."""
        seen: dict[str, list[Tensor]] = {site: [] for site in self.taps}

        def keep(site: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, given: Any, output: Any) -> None:
                first = output if isinstance(output, Tensor) else next(iter(_tensors(output)), None)
                if first is not None:
                    pooled = first.mean(1) if first.ndim == 3 and first.is_floating_point() else first.flatten(1)
                    seen[site].append(pooled.detach().clone())

            return hook

        hooks = [module.register_forward_hook(keep(site)) for site, module in self.taps.items()]
        try:
            with self._probing():
                self.forward(self.model, self.probe)
        finally:
            for hook in hooks:
                hook.remove()
        for site, outputs in seen.items():
            if not outputs:
                self.missing[f"val/{site}"] = "the module was not called on the probe"
        return {site: torch.cat(outputs) for site, outputs in seen.items() if outputs}

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Eval mode, no gradient, and no compiled graph, which would not know of hooks that came later."""
        with audits.undisturbed(self.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield

    def _write(self, rows: Mapping[str, float | Measured], step: int | None = None) -> None:
        told = {n: m for n, m in rows.items() if not isinstance(m, NotMeasured)}
        self.missing = {n: why for n, why in self.missing.items() if n not in told}
        self.missing |= {n: m.reason for n, m in rows.items() if isinstance(m, NotMeasured)}
        readings = {n: v if isinstance(v, Reading) else Reading(v, self.nulls.get(n)) for n, v in told.items()}
        step = self.count if step is None else step
        self.history.write(step, 0.0, readings)
        self.growing.add(step, readings)

    def _write_facts(self) -> None:
        write_atomically(self.folder.path / "audits.json", json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")


def _nulls(given: Mapping[str, float]) -> dict[str, float]:
    """By full name; a loss of one's own name has the same null on both splits."""
    both = {f"{split}/loss/{n}": value for n, value in given.items() if "/" not in n for split in ("train", "val")}
    return both | {n: value for n, value in given.items() if "/" in n}


def _weighed(losses: Loss | Mapping[str, Loss]) -> dict[str, tuple[Tensor | float, float]]:
    """Terms with their weights; a lone loss is the term ``total``."""
    if not isinstance(losses, Mapping):
        losses = {"total": losses}
    return {name: loss if isinstance(loss, tuple) else (loss, 1.0) for name, loss in losses.items()}


def _named(pairs: Mapping[str, tuple[Tensor | float, float]], numbers: Sequence[float]) -> dict[str, float]:
    """Losses by name, with their weighted total."""
    values = dict(zip(pairs, numbers, strict=True))
    if "total" not in values and values:
        values["total"] = sum(pairs[name][1] * v for name, v in values.items())
    return values


def _full(name: str, split: str, terms: Collection[str]) -> str:
    """``<split>/<site>/<quantity>``: ``val_loss`` is ``val/loss/total``, ``eval_f1`` is ``val/logged/f1``."""
    if name.count("/") == 2:
        return name
    plain = "".join(c if c.isalnum() or c in "_.-" else "_" for c in name)
    for before in ("eval_", "val_", "valid_", "validation_", "train_"):
        plain = plain.removeprefix(before)
    if plain in ("loss", "total"):
        return f"{split}/loss/total"
    if plain in terms or plain.endswith("_loss"):
        return f"{split}/loss/{plain.removesuffix('_loss')}"
    return f"{split}/logged/{plain}"


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares; by a dot product where that can be, which takes half the time of a norm on a CPU."""
    if gradient.dtype == torch.float32 and gradient.is_contiguous():
        return torch.dot(flat := gradient.view(-1), flat)
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).square()


def _sum(gradient: Tensor) -> Tensor:
    """NaN or infinite where an element is. Takes less time than ``_square``, for steps whose norm nobody reads."""
    return gradient.sum(dtype=torch.float32 if gradient.dtype == torch.float16 else None)


def _numbers(values: Sequence[Tensor | float], parts: Sequence[Tensor]) -> list[float]:
    """Values and the sum of the parts in one synchronisation, before the update that they may prevent."""
    tensors = [*(v for v in values if isinstance(v, Tensor)), *parts]
    device = next((t.device for t in tensors if not t.is_cpu), None)
    if device is None:
        known = [t.item() for t in tensors]
    else:
        known = torch.stack([t.detach().float().reshape(()).to(device) for t in tensors]).tolist()
    rest = iter(known)
    return [*(next(rest) if isinstance(v, Tensor) else float(v) for v in values), sum(rest)]


def _tensors(output: Any) -> Iterator[Tensor]:
    """Tensors in what a module returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _inner(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` or ``DistributedDataParallel`` wrapped: its names are those that its author knows."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _inner(model.module)
    return _inner(model._orig_mod) if isinstance(model, torch._dynamo.OptimizedModule) else model


def options(**given: Any) -> dict[str, Any]:
    """Keyword arguments for ``Monitor``, checked now and not when training starts.

    Raises:
        TypeError: an argument that it does not have.
    """
    inspect.signature(Monitor).bind(nn.Identity(), **given)
    return given


def _module(model: nn.Module, path: str) -> nn.Module:
    modules = dict(model.named_modules())
    if path not in modules:
        near = difflib.get_close_matches(path, modules, 3, 0.3) or [name for name in modules if name][:5]
        raise ValueError(f"The model has no module {path!r} to tap; nearest: {', '.join(near)}.")
    return modules[path]


def _new_folder(path: Path, steps: int | None) -> RunFolder:
    if (path / "run.json").is_file():
        raise ValueError(f"{path} holds a run already; give the monitor a folder of its own.")
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {"torch": torch.__version__}
    folder.update(
        id=uuid.uuid4().hex[:12], name=path.name, system=None, started=started, status="running", steps=steps,
        versions=versions, notices=[], seed=audits.seed(),
    )  # fmt: skip
    return folder
