"""``intaglio check RECIPE``: true parameter counts, memory, time and static faults, before a step is spent.

Counts and memory are those of the recipe as written, so an upper bound where the data supports fewer tokens or shorter
captions; time is that of the network as training builds it. Nothing of the network is allocated.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intaglio.config import Config
from intaglio.health.checks import Subject, subject_of
from intaglio.health.finding import Finding, Remedy
from intaglio.health.rules import static
from intaglio.health.rules.static import ATTENTION, DataFacts, Facts
from intaglio.models.cost import StepCost, machine_speed, step_cost, tensor_bytes
from intaglio.nn.documented_unet import UnnormedAttention
from intaglio.systems.base import System
from intaglio.systems.optimizers import parameter_groups


@dataclass(frozen=True)
class Parameters:
    """``modules`` adds up to ``total``; a tensor that two modules share counts once."""

    total: int
    trainable: int
    modules: Mapping[str, int]


@dataclass(frozen=True)
class Memory:
    """What one process holds at the end of a forward pass; ``activations`` are the tensors that autograd keeps."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activations_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Time:
    """An estimate; None where it could not be made. ``how`` says from what."""

    seconds_per_step: float | None
    total_seconds: float | None
    how: str


@dataclass(frozen=True)
class CheckReport:
    """What is known of a recipe before it is trained."""

    recipe: str
    parameters: Parameters
    memory: Memory
    time: Time
    findings: tuple[Finding, ...]
    not_checked: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; the keys are the names of the fields."""
        return asdict(self)

    @property
    def failing(self) -> bool:
        """Whether a finding is one that stops belief in the run."""
        return any(finding.severity == "fail" for finding in self.findings)


def check(config: Config) -> CheckReport:
    """Counts, measures and judges a configuration; reads labels and captions, and of this machine only its speed.

    An image folder is decoded once into the cache that training uses as well. Unusable data is a finding, not an error.
    """
    subject, train = subject_of(config), config.train
    unusable = subject.look()
    data, steps = subject.data, train.steps or (_steps(config, subject.data) if subject.data else None)
    not_checked = ["whether it learns: that takes a run, and `intaglio evaluate` measures it"]
    if data is None:
        not_checked.append(f"what depends on the data: {subject.of_the_data}, steps of an epoch")
    if steps is None:
        not_checked.append("the schedule against the length of the run, which is given in epochs of unknown data")

    system = subject.system()
    network = system.get_submodule("model.network")
    parameters, readings = _count(subject, system), subject.readings(system)
    precisions = {"fp32": [False], "bf16": [True], "auto": [False, True]}[train.precision]
    seen = [_trace(subject, system, bf16) for bf16 in precisions]
    memory = _memory(config, system, max(trace.cost.saved_bytes for trace in seen))
    not_checked.append("memory beyond the tensors: temporaries, convolution workspaces, the allocator's reserve")
    if train.precision == "auto":
        not_checked.append("which precision auto takes: memory is the larger of fp32 and bf16, time that of fp32")

    device = "cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu"
    facts = Facts(
        config,
        network,
        parameters=parameters.total,
        state_bytes=memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes,
        total_bytes=memory.total_bytes,
        terms=seen[0].terms,
        measured=seen[0].measured,
        unreached=_by_module(system, seen[0].cost.unreached),
        keys=seen[0].keys,
        readings=readings,
        steps=steps,
        data=data,
        machine_bytes=_machine_bytes(device),
    )
    time = _time(subject, device, steps, parameters.trainable)
    findings = (*unusable, *static.judge(facts))
    return CheckReport(config.name, parameters, memory, time, findings, (*not_checked, *subject.unsure))


def report_lines(report: CheckReport) -> list[str]:
    """The report for a terminal: the largest modules first, the gravest findings first."""
    p, m, t = report.parameters, report.memory, report.time
    frozen = "" if p.trainable == p.total else f", {p.trainable:,} of them trained"
    lines = [f"{report.recipe or 'recipe'}: {p.total:,} parameters{frozen}"]
    largest = sorted(p.modules.items(), key=lambda item: -item[1])
    lines += [f"  {name:<20} {count:>13,}  {count / p.total:>6.1%}" for name, count in largest]
    parts = {k.removesuffix("_bytes"): v for k, v in asdict(m).items() if k != "total_bytes" and v}
    lines.append(f"memory about {_size(m.total_bytes)}: {', '.join(f'{k} {_size(v)}' for k, v in parts.items())}")
    if t.seconds_per_step is None:
        lines.append(f"time not estimated: {t.how}")
    else:
        whole = f", {_duration(t.total_seconds)} in all" if t.total_seconds is not None else ""
        lines.append(f"time about {_duration(t.seconds_per_step)} a step{whole} ({t.how})")
    told: set[Remedy] = set()
    for finding in report.findings:
        lines.append(f"{finding.severity:<8}{finding.message} [{finding.rule}]")
        lines += [f"        → {remedy}" for remedy in finding.remedies if remedy not in told]
        told |= set(finding.remedies)
    if not any(f.severity != "note" for f in report.findings):
        lines.append("no static fault found")
    return lines + [f"not checked: {reason}" for reason in report.not_checked]


class _Trace(NamedTuple):
    cost: StepCost
    terms: set[str]
    measured: set[str]
    keys: dict[str, int]


def _count(subject: Subject, system: System) -> Parameters:
    tensors = list(system.parameters())
    trained = sum(p.numel() for p in tensors if p.requires_grad)
    return Parameters(sum(p.numel() for p in tensors), trained, subject.modules(system))


def _by_module(system: System, names: tuple[str, ...]) -> dict[str, int]:
    """Parameters of the named tensors, summed over each module."""
    counts: Counter[str] = Counter()
    for name in names:
        counts[name.rpartition(".")[0].removeprefix("model.network.")] += system.get_parameter(name).numel()
    return dict(counts)


def _loss(subject: Subject, system: System) -> tuple[Tensor, set[str]]:
    """The weighted loss of one process on blank items, and the names of its terms."""
    terms = system.loss_terms(subject.batch(system))
    # A term of weight 0 keeps its activations, but gives no gradient.
    return system.weigh({name: term for name, term in terms.items() if term.weight} or terms), set(terms)


def _trace(subject: Subject, system: System, bf16: bool) -> _Trace:
    """One pass over fake tensors, and what it showed."""
    terms: set[str] = set()
    measured = {"val/loss/total"}
    keys: dict[str, int] = {}

    def loss() -> Tensor:
        with torch.no_grad():
            measured.update(f"val/{name}" for name in subject.measured(system))
        value, names = _loss(subject, system)
        terms.update(names)
        return value

    def watch(name: str, which: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, given: keys.update({name: given[which].shape[-2]})

    network = system.get_submodule("model.network")
    attentions = [(n, m) for n, m in network.named_modules() if isinstance(m, ATTENTION)]
    hooks = [reader.register_forward_pre_hook(watch(n, which)) for n, m in attentions for reader, which in [_reader(m)]]
    cost = step_cost(system, loss, bf16)
    for hook in hooks:
        hook.remove()
    return _Trace(cost, terms, measured, keys)


def _reader(attention: nn.Module) -> tuple[nn.Module, int]:
    """The module that is given what the keys are made of, and as which argument."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention, 1
    part = attention.key if isinstance(attention, UnnormedAttention) else attention.key_value
    assert isinstance(part, nn.Module)
    return part, 0


def _memory(config: Config, system: System, activations: int) -> Memory:
    weights = tensor_bytes(system)
    gradients = sum(p.nbytes for p in system.parameters() if p.requires_grad)
    average = sum(p.nbytes for p in system.parameters() if p.requires_grad) if config.train.ema else 0
    one_moment = sum(
        p.nbytes
        for group in parameter_groups(system, config.optim.decay)
        for p in group["params"]
        if config.optim.kind == "muon" and group["orthogonal"]
    )
    parts = (weights, gradients, 2 * gradients - one_moment, average, activations)
    return Memory(*parts, sum(parts))


def _time(subject: Subject, device: str, steps: int | None, weights: int) -> Time:
    config = subject.config
    if config.train.device == "cuda" and device == "cpu":
        return Time(None, None, "the recipe asks for a GPU, and this machine has none")
    system, bf16 = subject.trained(), config.train.precision == "bf16"
    flops = step_cost(system, lambda: _loss(subject, system)[0], bf16).flops
    speed = machine_speed(device, bf16)
    sharing = config.train.devices if device == "cpu" else 1  # processes on one CPU share its cores
    one = speed.seconds(flops, config.train.accumulate * sharing, weights * sharing)
    how = (
        f"an estimate, likely low: {sum(flops.values()) / 1e9:,.0f} GFLOP a pass, and this {device.upper()} reaches "
        f"{speed.convolution / 1e9:,.0f} GFLOP/s in convolutions and {speed.product / 1e9:,.0f} in products "
        f"with {'bf16' if bf16 else 'fp32'}; looks and checkpoints not counted"
    )
    return Time(one, one * steps if steps else None, how)


def _steps(config: Config, data: DataFacts) -> int:
    per_step = config.train.batch_size * config.train.accumulate
    return math.ceil((config.train.epochs or 0) * data.train / per_step)


def _machine_bytes(device: str) -> int | None:
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} days"
