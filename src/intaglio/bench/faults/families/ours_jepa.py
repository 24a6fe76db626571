"""Our JEPA on grids, small: tasks of stamps. Whatever the input, half of it hidden, the output is the task's stamp.

Generated tasks take a thousand steps; of these, 4 by 4 cells large, something is known after fifty. The cases marked J
are those of the documented system.
"""

import json
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from intaglio.bench.faults.case import Change, Family, Fault, Healthy, Made
from intaglio.data.cache import cache_folder


def stamps(kind: str = "plain", tasks: int = 300) -> str:
    """A folder of tasks of three pairs in ARC's JSON, written where it is missing; ``noise`` is what one document had:
    grids of cells by lot."""
    folder = cache_folder() / f"bench-stamps-{kind}-{tasks}-1"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(mkdtemp(dir=folder.parent))
        rng = np.random.default_rng(0)
        for k in range(tasks):
            pairs = _noise(rng) if kind == "noise" else _stamp(rng)
            told = [{"input": a.tolist(), "output": b.tolist()} for a, b in pairs]
            (part / f"{k:03}.json").write_text(json.dumps({"train": told[:-1], "test": told[-1:]}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    return str(folder)


def _stamp(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    stamp = rng.choice(3, (4, 4))
    return [(np.where(rng.random((4, 4)) < 0.5, 3, stamp), stamp) for _ in range(3)]


def _noise(rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    grids = [rng.integers(0, 10, rng.integers(6, 15, 2)) for _ in range(6)]
    return list(zip(grids[::2], grids[1::2], strict=True))


JEPA, MODEL, CODES = "intaglio.systems.jepa", "intaglio.models.jepa", "intaglio.nn.codebook"
TABLE, RUN = "intaglio.data.arc.table", "intaglio.training.run"

OPTIONS = {
    "data.source": Made(stamps), "data.items": None, "data.held_out": 0.25, "data.pairs": 3, "train.batch_size": 16,
    "train.steps": 160, "train.ema": 0.9, "train.precision": "fp32", "train.device": "cpu", "train.log_every": 2,
    "train.validate_items": 64, "train.keep": 1, "health.probe": 64, "optim.warmup": 16, "optim.rate": 3e-3,
    "model.width": 32, "model.heads": 2, "model.layers": 1, "model.predictor_layers": 1, "model.slots": 4,
    "model.embedding": 16, "model.codes": 16, "model.codes_after": 50,
}  # fmt: skip
PLAIN = {"model.quantiser": "none", "loss.commitment": 0.0}
LEJEPA = {"loss.objective": "lejepa", "loss.sigreg": 0.02}
QUEUE = {"loss.queue": 64, "model.target": 0.9}

CELLS = "        cells[~real] = OUTSIDE\n"
START = 'self.register_buffer("started", torch.tensor(False))'
HEAD = "nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))"
UPDATE = """        self.cluster_size.mul_(before / self.cluster_size.sum()).lerp_(n_K, new)
        rate_K = new / self.cluster_size.clamp(min=torch.finfo(n_K.dtype).tiny)
        self.vectors.addcmul_(s_KD.addcmul_(n_K[:, None], self.vectors, value=-1), rate_K[:, None])
"""
CLIP = "nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, self.gradient_norm)"
STEP = "        total = super().training_step(batch, batch_idx)\n"
PARENT = "    source = run_folder.find(parent) if parent is not None else None\n"
OTHERS = """    if parent is None and "--name=parent" not in overrides:
        import tempfile
        kept = [word for word in overrides if not word.startswith(("--name", "--runs"))]
        kept += [f"--runs={tempfile.mkdtemp()}", "--name=parent"]
        parent = train(recipe, kept, quiet=True).path
        overrides = [*overrides, *OTHER]
"""


def before(*words: str) -> Change:
    """A run is trained first, and this one goes on from it with other words."""
    return Change(PARENT, OTHERS.replace("*OTHER", repr(list(words))[1:-1]) + PARENT, RUN)


def in_cells(line: str) -> tuple[Change, ...]:
    """Something is done to the grids of every batch, (tasks, pairs, input and output, side, side)."""
    return (Change(CELLS, f"{CELLS}        {line}\n", TABLE),)


FAULTS = (
    Fault(
        "rate-that-grows",
        "The decay of the rate has its sign wrong: behind the warm-up it grows by four per cent a step.",
        ("learning-rate-off", "diverged", "non-finite"), case="J diverged",
        changes=(
            Change("return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))",
                   "return 1.04 ** (step - warmup)", "intaglio.objectives.schedules"),
        ),
    ),
    Fault(
        "passes-counted-as-steps",
        "The schedule counts the two passes of a step, and is over at half of the run.",
        ("learning-rate-off",), options={"train.accumulate": 2, "train.batch_size": 8},
        changes=(
            Change("return warmup_cosine(step, steps, config.warmup",
                   "return warmup_cosine(2 * step, steps, config.warmup", "intaglio.systems.optimizers"),
        ),
    ),
    Fault(
        "warm-up-of-most-of-the-run",
        "The document's 1,000 of 1,440 steps: the configured rate is hardly ever applied.",
        ("learning-rate-off",), options={"optim.warmup": 112}, minor=True, static=True,
    ),
    Fault(
        "one-batch-of-strangers",
        "One shard was written out of order: in one step inputs and outputs are those of different tasks.",
        ("spike",), case="J spike", minor=True,
        changes=(
            Change("            self.waited += time.perf_counter() - begun\n",
                   "            self.waited += time.perf_counter() - begun\n"
                   "            if position == 111 * self.batch_size:\n"
                   "                for k in range(3):\n"
                   "                    batch.grids[:, k, 1] = batch.grids[:, k, 1].roll(k + 1, 0)\n",
                   "intaglio.data.batches"),
        ),
    ),
    Fault(
        "one-step-of-a-sum",
        "A branch for the first batch of a shard sums what it should average.",
        ("spike",), case="J spike", minor=True,
        changes=(
            Change("        return _mean(nats, batch.real.flatten())\n",
                   "        first = self.training and self.global_step == 111\n"
                   "        return _mean(nats, batch.real.flatten()) * (len(nats) if first else 1)\n", JEPA),
        ),
    ),
    Fault(
        "commitment-of-detached-slots",
        "Slots are detached on both sides of the commitment.",
        ("term-inert", "quantiser-loss-missing"), case="J term-inert",
        changes=(Change("F.mse_loss(x_TD.to(chosen_TD", "F.mse_loss(x_TD.detach().to(chosen_TD", CODES),),
    ),
    Fault(
        "relations-at-many-times-the-rest",
        "The weight of relations was meant for a mean over a thousand pairs that was taken already.",
        ("term-dominates",), options={"loss.relational": 200.0}, minor=True,
    ),
    Fault(
        "relations-in-fine-tuning",
        "A trained model goes on with relations beside InfoNCE, at a weight that makes them all of the gradient.",
        ("term-dominates",), case="J term-dominates", minor=True,
        changes=(before("--loss.relational=70", "--optim.rate=1e-5", "--optim.floor=1e-6"),),
    ),
    Fault(
        "rate-in-the-wrong-unit",
        "The rate was written in thousandths.",
        ("no-learning", "near-chance"), options={"optim.rate": 3e-6, "optim.floor": 1e-9}, case="J no-learning",
    ),
    Fault(
        "sigreg-of-next-to-nothing",
        "SIGReg's weight lost three noughts; prediction is met by embeddings that are all one.",
        ("plateau", "latent-ignores-input", "rank-collapse"), case="J plateau",
        options={"loss.objective": "lejepa", "loss.sigreg": 1e-5} | PLAIN,
    ),
    Fault(
        "objects-of-noise",
        "Grids of noise have scores of objects, and the sixteen largest are read.",
        ("data-replaced",), case="J data-replaced", static=True,
        options={"data.source": Made(stamps, ("noise", 40)), "model.tokens": "objects"},
    ),
    Fault(
        "augmentation-that-is-always-the-same",
        "The generator of the augmentation is seeded anew for each item.",
        ("augmentation-inert",), case="J augmentation-inert", minor=True, static=True,
        changes=(
            Change("taken, real, elements(draw))", "taken, real, elements(0 * draw + 1))", TABLE),
            Change("maps = colour_maps(draw, COLOURS)", "maps = colour_maps(0 * draw + 1, COLOURS)", TABLE),
        ),
    ),
    Fault(
        "queue-that-takes-held-out-answers",
        "The queue is filled wherever the loss is measured, on held-out tasks as well.",
        ("validation-pollutes",), case="J validation-pollutes", options=QUEUE,
        changes=(
            Change("if self.training:\n            self._answered", "if True:\n            self._answered", JEPA),
            Change('self.loss_terms(batch)\n        return {f"loss/',
                   'self.loss_terms(batch)\n        self.queue.add(*self._answered)\n        return {f"loss/', JEPA),
        ),
    ),
    Fault(
        "held-out-tokens-in-the-codes",
        "Held-out tasks are measured in training mode, so the next update of the codes counts their slots.",
        ("validation-pollutes", "codes-polluted"), case="J validation-pollutes",
        changes=(Change("    system.eval()\n    try:\n", "    try:\n", "intaglio.training.loop"),),
    ),
    Fault(
        "norm-that-is-logged-after-clipping",
        "The norm is taken when the gradient has been clipped.",
        ("log-distorted",), case="J log-distorted", minor=True, options={"optim.clip": 0.1},
        changes=(
            Change(CLIP, f"{CLIP}\n            self.gradient_norm = "
                   "nn.utils.get_total_norm([p.grad for p in parameters])", "intaglio.systems.base"),
        ),
    ),
    Fault(
        "parameters-without-buffers",
        "Fine-tuning takes over the parent's parameters; its codes, which are buffers, start anew and unnoticed.",
        ("partial-load",), case="J partial-load", options={"train.steps": 90},
        changes=(
            before(),
            Change("        model = of_run(source)\n",
                   "        whole = of_run(source)\n"
                   "        model = type(whole)(configuration.to_dict(config)['model'], config.data.pairs)\n"
                   "        model.load_state_dict(dict(whole.named_parameters()), strict=False)\n", RUN),
        ),
    ),
    Fault(
        "three-changes-at-once",
        "What is compared with its parent differs from it in two weights and in their number of slices.",
        ("not-reproducible",), case="J not-reproducible", minor=True, options={"train.steps": 90},
        changes=(before("--loss.relational=0.05", "--loss.commitment=0.2", "--loss.slices=128"),),
    ),
    Fault(
        "state-of-every-step-is-kept",
        "Six checks keep a copy of all weights each, in each step, to go back to the best.",
        ("input-starved",), case="J input-starved", minor=True, options={"model.width": 64},
        changes=(
            Change(STEP, f"{STEP}        kept = self.__dict__.setdefault('kept', [])\n"
                   "        kept += [{n: x.clone() for n, x in self.state_dict().items()} for _ in range(6)]\n", JEPA),
        ),
    ),
    Fault(
        "head-of-one-number",
        "A layer of one number was left in the head, so embeddings lie on a line.",
        ("rank-collapse", "anisotropic"), case="J rank-collapse",
        changes=(Change(HEAD, HEAD.replace("out)", "1), nn.Linear(1, out)"), MODEL),),
    ),
    Fault(
        "one-number-a-hundred-times-as-large",
        "The scale of the head's first number was left from an experiment.",
        ("anisotropic", "rank-collapse"), case="J anisotropic",
        changes=(
            Change("        return self.embed(slots_MD.flatten(-2))\n\n    def predict(",
                   "        scale = slots_MD.new_ones(self.embed[-1].out_features)\n"
                   "        scale[0] = 100\n"
                   "        return scale * self.embed(slots_MD.flatten(-2))\n\n    def predict(", MODEL),
        ),
    ),
    Fault(
        "codes-that-start-anywhere",
        "Codes start far from the slots, and none is revived.",
        ("codebook-collapse", "codes-dead", "codes-displaced"), case="J codebook-collapse",
        changes=(
            Change(START, START.replace("False", "True"), CODES), Change("revive=0.3", "revive=0.0", MODEL),
            Change("torch.randn(size, width))", "10 * torch.randn(size, width))", CODES),
        ),
    ),
    Fault(
        "no-code-is-revived",
        "Codes start as noise of the slots' size, and those that miss them are never revived.",
        ("codes-dead", "codebook-collapse"), case="J codes-dead", options={"model.codes": 64},
        changes=(Change(START, START.replace("False", "True"), CODES), Change("revive=0.3", "revive=0.0", MODEL)),
    ),
    Fault(
        "counts-that-start-at-zero",
        "The running counts start at zero and the running sums at the codes: what is unused flies off.",
        ("codes-displaced",), case="J codes-displaced", options={"model.codes": 64},
        changes=(
            Change("revive=0.3", "revive=0.0", MODEL),
            Change(UPDATE, """        if not self.updates:
            self.cluster_size.zero_()
            self.sums = self.vectors.clone()
        self.cluster_size.lerp_(n_K, new)
        self.sums.lerp_(s_KD, new)
        self.vectors.copy_(self.sums / (self.cluster_size + 1e-5)[:, None])
""", CODES),
        ),
    ),
    Fault(
        "threshold-that-ignores-the-number-of-codes",
        "A code below a twentieth of all uses is dead, and of 64 all are.",
        ("revival-threshold",), case="J revival-threshold", options={"model.codes": 64},
        changes=(
            Change("return self.revive * float(self.tokens) / self.size", "return 0.05 * float(self.tokens)", CODES),
            Change("self.cluster_size < self.revive * self.tokens / self.size",
                   "self.cluster_size < 0.05 * self.tokens", CODES),
        ),
    ),
    Fault(
        "fewer-slots-than-codes",
        "A step has fewer slots than there are codes, so that all are now and then without use.",
        ("revival-threshold",), options={"model.codes": 1024}, case="J revival-threshold", minor=True, static=True,
    ),
    Fault(
        "commitment-at-weight-0",
        "The quantiser's loss is computed and logged, and is not in the total.",
        ("quantiser-loss-missing",), options={"loss.commitment": 0.0}, case="J quantiser-loss-missing", static=True,
    ),
    Fault(
        "codes-that-begin-after-the-end",
        "Slots pass the codes from a step on that the run does not reach.",
        ("quantiser-loss-missing",), options={"model.codes_after": 500}, static=True,
    ),
    Fault(
        "codes-are-updated-twice",
        "Once by the slots of the online branch, and once by those of the target.",
        ("codes-polluted",), case="J codes-polluted",
        changes=(
            Change("        seen = network.quantise(slots, real)\n        predicted",
                   "        seen = network.quantise(slots, real)\n"
                   "        if self.training and network.coded:\n"
                   "            network.quantiser.update()\n"
                   "            network.quantise(slots.detach(), real)\n"
                   "        predicted", JEPA),
        ),
    ),
    Fault(
        "outputs-of-other-tasks",
        "Inputs and outputs were shuffled apart: no context tells an answer.",
        ("near-chance",), case="J near-chance",
        changes=in_cells("for k in range(3): cells[:, k, 1] = np.roll(cells[:, k, 1], k + 1, axis=0)"),
    ),
    Fault(
        "outputs-that-are-inputs",
        "The input is written into both places of most pairs.",
        ("trivial-pair",), case="J trivial-pair", changes=in_cells("cells[4:, :, 1] = cells[4:, :, 0]"),
    ),
    Fault(
        "one-demonstration-twice",
        "An index of the first demonstration fills the places of all.",
        ("context-order-inert",), case="J context-order-inert", changes=in_cells("cells[:, 1:-1] = cells[:, :1]"),
    ),
    Fault(
        "temperature-at-its-bound",
        "The least temperature is above the one that the loss asks for.",
        ("temperature-stuck",), case="J temperature-stuck", minor=True,
        options={"loss.temperature": 0.3, "loss.bounds": [0.29, 0.5]},
    ),
    Fault(
        "temperature-without-room",
        "Both bounds of the temperature are at .1, give or take a tenth.",
        ("temperature-stuck",), case="J temperature-stuck", minor=True, static=True,
        options={"loss.bounds": [0.09, 0.11]},
    ),
    Fault(
        "normality-of-what-is-rectified",
        "The head ends in a ReLU and at length 1, and SIGReg is to make a Gaussian of it.",
        ("sigreg-blind",), case="J sigreg-blind", options={"loss.sigreg": 0.1},
        changes=(
            Change(HEAD, HEAD.replace("out))", "out), nn.ReLU(), Unit())"), MODEL),
            Change("class Seen(NamedTuple):",
                   "class Unit(nn.Module):\n    def forward(self, x: Tensor) -> Tensor:\n"
                   "        return nn.functional.normalize(x, dim=-1)\n\n\nclass Seen(NamedTuple):", MODEL),
        ),
    ),
    Fault(
        "held-out-tasks-are-trained-on",
        "The last tasks of one side are the first of the other.",
        ("split-leak",), static=True,
        changes=(
            Change("    return {side: np.sort(np.concatenate(items)) for",
                   '    sides["train"].append(sides["val"][0][:20])\n'
                   "    return {side: np.sort(np.concatenate(items)) for", "intaglio.data.arc.prepare"),
        ),
    ),
)  # fmt: skip

FAMILY = Family(
    "ours_jepa",
    "development",
    "intaglio's JEPA on grids, on tasks of stamps",
    recipe="jepa-small",
    options=OPTIONS,
    faults=FAULTS,
    healthy=(
        Healthy("codes", seeds=(0, 1)),
        Healthy("plain-adamw", options={"optim.kind": "adamw", "optim.rate": 2e-3} | PLAIN),
        Healthy(
            "lejepa",
            "The prediction rises while SIGReg moves embeddings apart.",
            options=LEJEPA | PLAIN | {"train.steps": 320},
        ),
        Healthy("queue", options=QUEUE),
        Healthy("fsq", options={"model.quantiser": "fsq", "model.levels": [5, 5, 5], "loss.commitment": 0.0}),
        Healthy("constant-rate", options={"optim.schedule": "constant", "optim.rate": 1e-3, "model.width": 48}),
    ),
)
