"""Health inside our trainer: audits in the first steps, a panel and trials at each look, a verdict on what is known.

Nothing here draws from the global generator, keeps a gradient, or changes a weight, a buffer or a mode: weights after N
steps are bit-identical with it and without.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from intaglio.config import Config
from intaglio.health import audits
from intaglio.health.diagnosis import Diagnosis, diagnose, load_profile, record_of, write_findings
from intaglio.health.finding import Finding
from intaglio.health.notify import Notifier
from intaglio.health.panel import Panel
from intaglio.health.panel import terms as terms_panel
from intaglio.health.plan import breaches, load_plan, unread
from intaglio.health.record import Record
from intaglio.history import Measured, Reading
from intaglio.history.run_folder import RunFolder, write_atomically
from intaglio.objectives.distributed import alone
from intaglio.systems.base import System
from intaglio.training.ema import EMA

AUDITED, PATIENCE = 3, 10
"""Optimizer steps in which gradients are watched, and at most while a tensor has none or does not move: behind a layer
that starts at zero the first gradients are too small to move anything."""

EARLY = (0.01, 0.03)
"""Shares of the run at which health looks besides the looks at held-out items: most faults are there from the start."""

LOOKED = "train/speed/look_seconds"
"""Written when a look is over, so that the history says which look was the last one."""


class Asked(NamedTuple):
    """What a plan wants done at a look: the reason to stop, and whether the weights are kept."""

    stop: str | None = None
    checkpoint: bool = False


class Health:
    """Watches one run of our trainer; ``probe`` gives the fixed held-out batch, ``say`` tells a person."""

    def __init__(
        self, config: Config, folder: RunFolder, probe: Callable[[], Any], bf16: bool, say: Callable[[str], None]
    ):
        self.config, self.folder, self.probe, self.bf16, self.say = config, folder, probe, bf16, say
        self.profile, self.plan = load_profile(config.health.profile), load_plan(config.plan)
        self.notifier = Notifier(folder.path)
        self.record = Record({})
        steps = config.train.steps or 0
        self.early = {max(AUDITED + 1, int(share * steps)) for share in EARLY}
        self.silence = audits.Silence()
        self.facts: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.before: dict[str, str] = {}
        self.told: set[tuple[str, str]] = set()
        self.first = self.validations = 0

    def start(self, system: System, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Audits at load: counts, tied tensors, what the optimizer holds, ranges."""
        self.first = step
        self.before = audits.fingerprints(system)
        self.facts = audits.parameters(system) | {
            "not_in_optimizer": audits.not_in_optimizer(system, optimizer),
            "ranges": system.ranges(self.probe()),
            "built_for": system.built_for,
            "patient_from": system.patient_from,
        }

    def before_update(self, system: System) -> None:
        """After a backward pass, before clipping: whether each tensor has a gradient."""
        self.silence.look(system)

    def after_update(self, system: System, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Closes the audits of the first steps."""
        if not self.before or step - self.first < AUDITED:
            return
        still, silent = audits.unmoved(system, self.before, optimizer), self.silence.silent
        if (still or silent) and step - self.first < PATIENCE:
            return
        self.facts["dead_parameters"] = self.silence.by_module()
        self.facts["unmoved"] = [name for name in still if name not in (silent or ())]
        self.before = {}
        self._write()

    def auditing(self, step: int) -> bool:
        """Whether gradients of the step after ``step`` are watched."""
        return bool(self.before) and step - self.first < PATIENCE

    @contextmanager
    def validation(self, system: System) -> Iterator[None]:
        """Around a look at held-out items: what the first, second, fourth, eighth … of them changes."""
        self.validations += 1
        if self.validations & (self.validations - 1):
            yield
            return
        found: dict[str, Any] = {}
        with audits.around_validation(system, found), audits.called_in_training_mode(system) as training:
            yield
        found["training_in_validation"] = sorted(training)
        for name, now in found.items():
            self.facts[name] = list(dict.fromkeys([*self.facts.get(name, ()), *now]))
        self._write()

    def audit(self, system: System, optimizer: torch.optim.Optimizer) -> None:
        """What the optimizer holds of the parts that are trained by now, of which a stage may have frozen some."""
        forgotten = audits.not_in_optimizer(system, optimizer)
        if forgotten != self.facts["not_in_optimizer"]:
            self.facts["not_in_optimizer"] = forgotten
            self._write()

    def look(self, system: System, ema: EMA | None) -> dict[str, Reading]:
        """Every reading of the probe batch, with averaged weights; gradients of each term with live ones."""
        panel = Panel({}, {})
        batch = system.transfer_batch_to_device(self.probe(), system.device, 0)
        with audits.undisturbed(system), alone():
            with ema.applied(system) if ema else nullcontext(), torch.no_grad():
                for site, measured in system.read(batch).items():
                    panel.add(site, measured)
            self._gradients(system, batch, panel)
            if ema:
                self._average(system, batch, ema, panel)
        self.missing = panel.missing
        return panel.readings

    def _gradients(self, system: System, batch: Any, panel: Panel) -> None:
        """Norm, share and cosine of each term's gradient, weights applied, on a few items of the probe."""
        few = type(batch)(*(x[:16] for x in batch))
        with torch.enable_grad(), torch.autocast(system.device.type, torch.bfloat16, enabled=self.bf16):
            terms = system.loss_terms(few)
        weighted = {name: t.weight * t.value.float() for name, t in terms.items() if t.weight}
        for name, measured in terms_panel(weighted, system).items():
            panel.add(f"train/term.{name}", measured)

    def _average(self, system: System, batch: Any, ema: EMA, panel: Panel) -> None:
        """The averaged weights beside the live ones: their loss on a few items, and how far each has come."""
        few = type(batch)(*(x[:64] for x in batch))
        with torch.no_grad():
            live = _loss(system, few)
            with ema.applied(system):
                averaged = _loss(system, few)
        strange = set(ema.average) - {name for name, _ in system.named_parameters()}
        readings: dict[str, Measured] = {
            "loss": Reading(averaged, live, len(few[0])),
            "moved": Reading(ema.moved(system), 1.0),
            "averaged_buffers": Reading(float(len(strange)), 0.0),
        }
        panel.add("val/ema", readings)

    def judge(self) -> Diagnosis:
        """The verdict on the run so far; writes ``findings.json`` and says what is new."""
        self.record = record_of(self.folder)
        diagnosis = diagnose(self.record, self.profile, not_measured=self.missing)
        write_findings(self.folder, diagnosis)
        for finding in diagnosis.findings:
            if finding.severity != "note" and (finding.rule, finding.severity) not in self.told:
                self.told.add((finding.rule, finding.severity))
                self.say(_told(finding))
        return diagnosis

    def act(self, step: int) -> Asked:
        """Does what the plan says of the limits that were broken since the look before; after ``judge``.

        Which these are is read from the history, so that a resumed run does what an uninterrupted one does.
        """
        before = self.record.get(LOOKED)
        since = int(before.steps[-1]) if before else -1
        broken = [b for b in breaches(self.plan, self.record) if b.last > since]
        new = [b for b in broken if b.began > since]
        for b in new:
            self.notifier.send(b.limit, b.finding, step)
        self._notice(*self.notifier.failures(), *unread(self.plan, self.record, self.missing))
        stop = next((f"health: {b.limit.id}" for b in broken if b.limit.stop), None)
        return Asked(stop, any(b.limit.checkpoint for b in new))

    def close(self) -> None:
        """Waits for what the plan has to send."""
        self._notice(*self.notifier.close())

    def _notice(self, *notices: str) -> None:
        """Each one once in ``run.json``, and said."""
        for notice in notices:
            if notice not in self.folder.record["notices"]:
                self.folder.notice(notice)
                self.say(f"note: {notice}")

    def _write(self) -> None:
        text = json.dumps(self.facts, indent=2, ensure_ascii=False)
        write_atomically(self.folder.path / "audits.json", text + "\n")


def _loss(system: System, batch: Any) -> float:
    """The weighted sum of the terms, as a look at held-out items measures them."""
    with torch.autocast(system.device.type, torch.bfloat16, enabled=system.bf16):
        sums = system.measure(batch)
    return sum(
        weight * float(total / count)
        for name, weight in system.weights.items()
        for total, count in [sums[f"loss/{name}"]]
    )


def _told(finding: Finding) -> str:
    remedy = f"; try: {finding.remedies[0]}" if finding.remedies else ""
    return f"{finding.severity}: {finding.message} [{finding.rule}]{remedy}"
