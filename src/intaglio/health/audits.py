"""Audits at load and in the first steps: facts that no curve shows, as plain dicts for the rules and ``audits.json``.

Nothing here changes a weight, a buffer, a gradient, a mode or the global generator.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def parameters(model: nn.Module) -> dict[str, Any]:
    """How many parameters are trained, and tensors that are one but of which only some are trained."""
    owners: dict[int, list[tuple[str, bool]]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        owners[p.data_ptr() or id(p)].append((name, p.requires_grad))  # empty and meta tensors have no address
    frozen = [[name for name, _ in shared] for shared in owners.values() if len({trained for _, trained in shared}) > 1]
    tied = [[n for n, _ in shared] for shared in owners.values() if len(shared) > 1 and not any(t for _, t in shared)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": trained, "tied_and_frozen": frozen + tied}


def without_gradient(model: nn.Module) -> dict[str, int]:
    """Parameters, by module, whose gradient is absent or all zero after a backward pass: {module: count}."""
    silent: dict[str, int] = defaultdict(int)
    for name, p in model.named_parameters():
        if p.requires_grad and p.numel() and (p.grad is None or not bool(p.grad.any())):
            silent[name.rpartition(".")[0] or name] += p.numel()
    return dict(silent)


UNSEEDED = 67280421310721
"""The seed of PyTorch's generator in a process where nobody set one, in versions that do not draw it."""

WRITTEN = 2**32
"""Seeds from here on are drawn by PyTorch, in a fresh process or by ``torch.seed()``, and written by nobody."""


def seed() -> int | None:
    """The seed that somebody set, or None."""
    found = torch.initial_seed()
    return None if found == UNSEEDED or found >= WRITTEN else found


LEAST_RATE = 1e-7
"""Rates below this move a number of the size of 1 by less than float32 can tell."""


class Silence:
    """Watches gradients: what stays without one is dead. ``absent`` are those that had not even zeros: never called."""

    def __init__(self) -> None:
        self.silent: set[str] | None = None
        self.absent: set[str] = set()
        self.sizes: dict[str, int] = {}

    def look(self, model: nn.Module) -> None:
        """One backward pass; tensors that had a gradient once, or were frozen since, are not looked at again."""
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
        if self.silent is None:
            self.silent, self.sizes = set(trained), {n: p.numel() for n, p in trained.items()}
            self.absent = set(trained)
        self.absent = {n for n in self.absent & trained.keys() if trained[n].grad is None}
        self.silent = {n for n in self.silent & trained.keys() if (g := trained[n].grad) is None or not bool(g.any())}

    def by_module(self, absent: bool = False) -> dict[str, int]:
        """{module: parameters that never had a gradient}; of those that were never called alone, if asked for."""
        found: dict[str, int] = defaultdict(int)
        for name in sorted(self.absent if absent else self.silent or ()):
            found[name.rpartition(".")[0] or name] += self.sizes[name]
        return dict(found)


class Leftovers:
    """Watches in the first steps whether a gradient of before is still there when that of the next batch is added."""

    def __init__(self) -> None:
        self.watched: nn.Parameter | None = None
        self.steps = self.kept = self.version = 0
        self.added = self.emptied = False

    def look(self, parameters: Sequence[nn.Parameter]) -> None:
        """Between backward and the update. What was not updated since the last look gathers micro-batches by right."""
        if self.watched is None:
            self.watched = next(
                (p for p in parameters if p.requires_grad and p.is_leaf and p.grad is not None and bool(p.grad.any())),
                None,
            )
            if self.watched is None:
                return
            self.hook = self.watched.register_hook(self._adds)
        elif self.added and self.watched._version != self.version:
            self.steps += 1
            self.kept += not self.emptied
        self.added = self.emptied = False
        self.version = self.watched._version

    def _adds(self, gradient: Tensor) -> None:
        before = self.watched.grad if self.watched is not None else None
        self.added = True
        self.emptied |= before is None or not bool(before.any())

    def end(self) -> dict[str, Any]:
        """In how many of how many steps it was there: a fact for the rules."""
        if self.watched is not None:
            self.hook.remove()
        return {"gradients_kept": {"steps": self.steps, "kept": self.kept}} if self.steps else {}


def not_in_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of trainable tensors that no group of the optimizer holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer, saved or not, by name: the first of the names of one that is tied."""
    return {n: _digest(t) for n, t in (*model.named_parameters(), *model.named_buffers())}


def unmoved(model: nn.Module, before: Mapping[str, str], optimizer: torch.optim.Optimizer) -> list[str]:
    """Trainable tensors in the optimizer, at a rate that can move a float, that are what they were ``before``."""
    moving = {id(p) for group in optimizer.param_groups if group["lr"] >= LEAST_RATE for p in group["params"]}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel() and id(p) in moving]
    return [n for n, p in trained if n in before and before[n] == _digest(p)]


def moving(model: nn.Module, before: Mapping[str, str]) -> list[str]:
    """Frozen parameters that move all the same, as an averaged teacher does, whose answers are moving targets."""
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad and n in before]
    return [n for n, p in frozen if before[n] != _digest(p)]


@contextmanager
def around_validation(model: nn.Module, facts: dict[str, Any]) -> Iterator[None]:
    """Writes into ``facts`` which tensors a look at held-out items changed."""
    before = fingerprints(model)
    yield
    after = fingerprints(model)
    facts["changed_by_validation"] = [n for n in after if before.get(n) != after[n]]


def drops(module: nn.Module) -> bool:
    """Whether a module drops some of what it is given while it is in training mode."""
    share = getattr(module, "p" if "Drop" in type(module).__name__ else "dropout", 0.0)
    return isinstance(share, float) and share > 0


@contextmanager
def called_in_training_mode(model: nn.Module) -> Iterator[set[str]]:
    """Names of the modules with buffers, or that drop, that are called inside while they are in training mode."""
    found: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def look(module: nn.Module, given: Any) -> None:
            if module.training:
                found.add(name)

        return look

    watched = [
        (n, m) for n, m in model.named_modules() if n and (drops(m) or any(True for _ in m.buffers(recurse=False)))
    ]
    hooks = [m.register_forward_pre_hook(watch(name)) for name, m in watched]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Afterwards the generators of torch, CUDA if in use, Python and numpy are where they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards modes and generators are what they were."""
    modes = [(m, m.training) for m in model.modules()]
    with _generators_kept():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def ranges(targets: Tensor, low: float, high: float) -> dict[str, float]:
    """The range of the targets beside what the output's activation reaches."""
    least, most = torch.aminmax(targets.detach().float())
    return {"target_low": float(least), "target_high": float(most), "low": low, "high": high}


def augmentation(change: Callable[[Tensor], Tensor], items_B: Tensor, draws: int = 4) -> dict[str, float]:
    """The share of items that ``change`` alters, in size or in value, and the share for which two draws differ.

    Chance comes from a fixed seed, be it torch's, CUDA's, Python's or numpy's.
    """
    with _generators_kept(), torch.no_grad():
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        random.seed(0)
        np.random.seed(0)
        made = [[change(x) for x in items_B] for _ in range(draws)]
    changed = np.mean([_differ(m, x) for drawn in made for m, x in zip(drawn, items_B, strict=True)])
    variety = np.mean([any(_differ(m, of_item[0]) for m in of_item[1:]) for of_item in zip(*made, strict=True)])
    return {"changed": float(changed), "variety": float(variety)}


def _differ(a: Tensor, b: Tensor) -> bool:
    """NaN differs from itself."""
    return a.shape != b.shape or bool((a != b).any())


def loaded(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Keys of a checkpoint that the model lacks, that the checkpoint lacks, and whose shapes differ."""
    own = model.state_dict()
    shared = own.keys() & state.keys()
    return {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "reshaped": sorted(name for name in shared if own[name].shape != state[name].shape),
    }


def leaks(train: Sequence[bytes | str] | np.ndarray, held_out: Sequence[bytes | str] | np.ndarray) -> int:
    """How many held-out items are exactly one of the training items: arrays row by row, bytes, or names of groups."""
    seen = {_of_item(x) for x in train}
    return sum(_of_item(x) in seen for x in held_out)


def _of_item(item: bytes | str | np.ndarray) -> bytes:
    raw = item.encode() if isinstance(item, str) else item
    return hashlib.blake2b(raw if isinstance(raw, bytes) else np.ascontiguousarray(raw).tobytes()).digest()


def _digest(tensor: Tensor) -> str:
    """Of the bytes: NaN equals itself, and 0 is not −0."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).hexdigest()
