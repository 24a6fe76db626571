"""``intaglio check RECIPE``: true parameter counts, memory, time and static faults, before a step is spent.

Counts and memory are those of the recipe as written, so an upper bound where the data supports fewer tokens or shorter
captions; time is that of the network as training builds it. Nothing of the network is allocated.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.config import Config, MultimodalConfig, to_dict
from intaglio.data import order
from intaglio.data.batches import Batch
from intaglio.data.prepare import BUILT_IN_ITEMS, open_corpus
from intaglio.data.splits import split
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.health.finding import Finding, Remedy, remedies
from intaglio.health.rules import static
from intaglio.health.rules.static import DataFacts, Facts
from intaglio.models.cost import StepCost, machine_speed, parameter_counts, step_cost, tensor_bytes
from intaglio.models.multimodal import MultimodalModel
from intaglio.nn.transformer import Attention
from intaglio.systems.multimodal import MultimodalSystem
from intaglio.systems.optimizers import parameter_groups

SAMPLE = 2_000
"""Built-in scenes whose captions are read; all of a folder are."""

SAMPLE_IMAGES = 64


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
    """Counts, measures and judges a configuration; reads the captions, and of this machine only its speed.

    An image folder is decoded once into the cache that training uses as well. Unusable data is a finding, not an error.
    """
    assert isinstance(config, MultimodalConfig), "the only system so far"
    train, not_checked = config.train, ["whether it learns: that takes a run, and `intaglio evaluate` measures it"]
    data, unusable = _read_data(config)
    if data is None:
        not_checked.append("what depends on the data: real vocabulary, caption lengths, pixels, steps of an epoch")
    steps = train.steps or (_steps(config, data) if data else None)
    if steps is None:
        not_checked.append("the schedule against the length of the run, which is given in epochs of unknown data")

    system = _system(config, config.data.text_length, config.model.vocabulary)
    parameters = _count(system)
    precisions = {"fp32": [False], "bf16": [True], "auto": [False, True]}[train.precision]
    seen = [_trace(system, config.data.text_length, bf16) for bf16 in precisions]
    memory = _memory(config, system, max(trace.cost.saved_bytes for trace in seen))
    not_checked.append("memory beyond the tensors: temporaries, convolution workspaces, the allocator's reserve")
    if train.precision == "auto":
        not_checked.append("which precision auto takes: memory is the larger of fp32 and bf16, time that of fp32")

    device = "cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu"
    facts = Facts(
        config,
        system.model.network,
        parameters=parameters.total,
        state_bytes=memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes,
        total_bytes=memory.total_bytes,
        terms=seen[0].terms,
        measured=seen[0].measured,
        unreached=_by_module(system, seen[0].cost.unreached),
        keys=seen[0].keys,
        steps=steps,
        data=data,
        machine_bytes=_machine_bytes(device),
    )
    time = _time(config, device, data, steps, parameters.trainable)
    return CheckReport(config.name, parameters, memory, time, (*unusable, *static.judge(facts)), tuple(not_checked))


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


def _system(config: MultimodalConfig, text_length: int, vocabulary: int) -> MultimodalSystem:
    plain = to_dict(config)
    with torch.device("meta"):
        model = MultimodalModel(plain["model"], plain["prior"], config.data.image_size, text_length, vocabulary)
        return MultimodalSystem(config, config.train.steps or 1, model, {})


def _count(system: MultimodalSystem) -> Parameters:
    modules = parameter_counts(system.model.network)
    if prior := sum(p.numel() for p in system.model.prior.parameters()):
        modules["prior"] = prior
    if pairing := sum(p.numel() for p in system.pairing.parameters()):
        modules["pairing"] = pairing
    tensors = list(system.parameters())
    return Parameters(sum(p.numel() for p in tensors), sum(p.numel() for p in tensors if p.requires_grad), modules)


def _by_module(system: MultimodalSystem, names: tuple[str, ...]) -> dict[str, int]:
    """Parameters of the named tensors, summed over each module."""
    counts: Counter[str] = Counter()
    for name in names:
        counts[name.rpartition(".")[0].removeprefix("model.network.")] += system.get_parameter(name).numel()
    return dict(counts)


def _loss(system: MultimodalSystem, text_length: int) -> tuple[Tensor, set[str]]:
    """The weighted loss of one process on blank items, and the names of its terms."""
    terms = system.loss_terms(_blank(system, text_length))
    # A term of weight 0 keeps its activations, but gives no gradient.
    return system.weigh({name: term for name, term in terms.items() if term.weight} or terms), set(terms)


def _blank(system: MultimodalSystem, text_length: int) -> Batch:
    train, size = system.config.train, system.model.image_size
    n = train.batch_size // train.devices
    return Batch(torch.zeros(n, 3, size, size, dtype=torch.uint8), torch.ones(n, text_length, dtype=torch.long))


def _trace(system: MultimodalSystem, text_length: int, bf16: bool) -> _Trace:
    """One pass over fake tensors, and what it showed."""
    terms: set[str] = set()
    measured = {"val/loss/total"}
    keys: dict[str, int] = {}

    def loss() -> Tensor:
        with torch.no_grad():
            measured.update(f"val/{name}" for name in system.measure(_blank(system, text_length)))
        value, names = _loss(system, text_length)
        terms.update(names)
        return value

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, given: keys.update({name: given[1].shape[-2]})

    attentions = [
        (n, m) for n, m in system.model.network.named_modules() if isinstance(m, nn.MultiheadAttention | Attention)
    ]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in attentions]
    cost = step_cost(system, loss, bf16)
    for hook in hooks:
        hook.remove()
    return _Trace(cost, terms, measured, keys)


def _memory(config: MultimodalConfig, system: MultimodalSystem, activations: int) -> Memory:
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


def _time(config: MultimodalConfig, device: str, data: DataFacts | None, steps: int | None, weights: int) -> Time:
    if config.train.device == "cuda" and device == "cpu":
        return Time(None, None, "the recipe asks for a GPU, and this machine has none")
    length = data.longest if data else config.data.text_length
    system = _system(config, length, data.vocabulary if data else config.model.vocabulary)
    bf16 = config.train.precision == "bf16"
    flops = step_cost(system, lambda: _loss(system, length)[0], bf16).flops
    speed = machine_speed(device, bf16)
    sharing = config.train.devices if device == "cpu" else 1  # processes on one CPU share its cores
    one = speed.seconds(flops, config.train.accumulate * sharing, weights * sharing)
    how = (
        f"an estimate, likely low: {sum(flops.values()) / 1e9:,.0f} GFLOP a pass, and this {device.upper()} reaches "
        f"{speed.convolution / 1e9:,.0f} GFLOP/s in convolutions and {speed.product / 1e9:,.0f} in products "
        f"with {'bf16' if bf16 else 'fp32'}; looks and checkpoints not counted"
    )
    return Time(one, one * steps if steps else None, how)


def _read_data(config: MultimodalConfig) -> tuple[DataFacts | None, list[Finding]]:
    """Facts of the data, or a finding that says why there are none."""
    data, scale = config.data, 1.0
    if data.source == "engravings":
        items = data.items or BUILT_IN_ITEMS
        data = replace(data, items=min(items, SAMPLE))
        scale = items / min(items, SAMPLE)
    try:
        corpus = open_corpus(data, config.seed)
        sides, _ = split(corpus, {"train": 1 - data.held_out, "val": data.held_out}, config.seed)
    except ValueError as error:
        return None, [
            Finding("data-unusable", "fail", str(error), {}, remedies("name the folder: --data.source FOLDER"))
        ]
    captions = [corpus.captions(i) for i in range(len(corpus))]
    tokenizer = CaptionTokenizer.train((c for i in sides["train"] for c in captions[i]), config.model.vocabulary)
    flat = [c for several in captions for c in several]
    encoded = tokenizer.encode(flat, data.text_length)
    size = 64 if data.source == "engravings" else data.image_size  # how far pixels reach does not hang on the size
    looked_at = order.permutation(len(corpus), 0, 0)[:SAMPLE_IMAGES]
    extremes = np.array([(image.min(), image.max()) for image in (corpus.image(int(i), size) for i in looked_at)])
    return DataFacts(
        round(scale * len(sides["train"])),
        round(scale * len(sides["val"])),
        len(tokenizer),
        encoded.ids.shape[1],
        len(flat),
        encoded.truncated,
        int(extremes[:, 0].min()),
        int(extremes[:, 1].max()),
        len(corpus),
    ), []


def _steps(config: MultimodalConfig, data: DataFacts) -> int:
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
