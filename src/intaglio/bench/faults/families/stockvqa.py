"""Visual question answering as it was first done (Antol et al. 2015): a CNN and a GRU, multiplied, and a softmax over
the answers. Accuracy is in percent."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Pictures, pictures
from intaglio.health import audits
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

ASKED = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "row": ROWS, "column": COLUMNS}
QUESTIONS = [*(f"what {kind} is it" for kind in ASKED), *(f"is the thing {colour}" for colour in COLOURS)]
QUESTIONS += [f"is there a {shape}" for shape in SHAPES]
VOCAB = {word: k + 1 for k, word in enumerate(sorted({word for q in QUESTIONS for word in q.split()}))}
ANSWERS = ["yes", "no", *(word for words in ASKED.values() for word in words)]
KINDS = (*ASKED, "yes/no")


class Items(NamedTuple):
    image: Tensor
    question: Tensor
    answer: Tensor
    kind: Tensor


def ask(data: Pictures, seed: int, share_yes_no: float) -> Items:
    """One question of each picture."""
    draw = torch.Generator().manual_seed(seed)
    told, questions, answers, kinds = data.factors.tolist(), [], [], []
    for row in told:
        if torch.rand((), generator=draw) < share_yes_no:
            k = 5 + int(torch.randint(7, (), generator=draw))
            right = row[1] == k - 5 if k < 9 else row[0] == k - 9
            answers.append(0 if right else 1)
            kinds.append(5)
        else:
            k = int(torch.randint(5, (), generator=draw))
            answers.append(ANSWERS.index(list(ASKED.values())[k][row[k]]))
            kinds.append(k)
        words = [VOCAB[word] for word in QUESTIONS[k].split()]
        questions.append([0] * (4 - len(words)) + words)
    return Items(data.images, torch.tensor(questions), torch.tensor(answers), torch.tensor(kinds))


class VQA(nn.Module):
    def __init__(self, hidden: int, dropout: float, rnn: str):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, hidden),
        )  # fmt: skip
        self.embed = nn.Embedding(len(VOCAB) + 1, 32)
        self.rnn = getattr(nn, rnn)(32, hidden, batch_first=True)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(hidden, len(ANSWERS)),
        )

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        v = torch.tanh(self.cnn(image))
        q = torch.tanh(self.rnn(self.embed(question))[0][:, -1])
        logits: Tensor = self.classifier(v * q)
        return logits


def loader(items: Items, size: int) -> Iterator[Items]:
    while True:
        for idx in torch.randperm(len(items.answer)).split(size):
            yield Items(items.image[idx], items.question[idx], items.answer[idx], items.kind[idx])


def percent(logits: Tensor, answer: Tensor) -> float:
    return 100.0 * float((logits.argmax(1) == answer).float().mean())


def guessed(train: Items, test: Items) -> Tensor:
    """Whether the commonest answer to each question is right."""
    key, asked = ((items.question * torch.tensor([1, 100, 10_000, 1_000_000])).sum(1) for items in (train, test))
    common = {int(k): int(train.answer[key == k].bincount().argmax()) for k in key.unique()}
    return torch.tensor([common.get(int(k), 1) for k in asked]) == test.answer


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 6000, lr: float = 1e-3,
    hidden: int = 128, dropout: float = 0.3, rnn: str = "GRU", optimizer: str = "Adam", yes_no: float = 0.3,
    decay: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    data, test = ask(pictures(items, seed), seed, yes_no), ask(pictures(600, 10_000 + seed), 10_000 + seed, yes_no)
    model = VQA(hidden, dropout, rnn)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=lr, **more)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, decay or steps, 0.1)
    criterion = nn.CrossEntropyLoss()
    prior = guessed(data, test).float()

    def read(model: Any, probe: Items) -> dict[str, Any]:
        logits = model(probe.image, probe.question)
        exchanged = model(probe.image.roll(1, 0), probe.question)
        cost = float(criterion(exchanged, probe.answer) - criterion(logits, probe.answer))
        found: dict[str, Any] = {"val/answer": {"shuffled_image_nats": Reading(cost, 0.0, len(logits))}}
        right = (logits.argmax(1) == probe.answer).float()
        for k, kind in enumerate(KINDS):
            asked = probe.kind == k
            if asked.any():
                value, null = float(right[asked].mean()), float(prior[asked].mean())
                found[f"val/answer.{kind.replace('/', '')}"] = {"accuracy": Reading(value, null, int(asked.sum()))}
        return found

    share = data.answer.bincount(minlength=len(ANSWERS)) / len(data.answer)
    null = float(-share[test.answer].clamp_min(1e-3).log().mean())
    monitor = Monitor(
        model, opt, folder=folder, probe=test, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/total": null, "val/loss/total": null, "val/answer/accuracy": 100 * float(prior.mean())},
    )  # fmt: skip
    monitor.audit(leaks={"the very same picture": audits.leaks(list(data.image.numpy()), list(test.image.numpy()))})
    for step, batch in enumerate(loader(data, size), 1):
        model.train()
        logits = model(batch.image, batch.question)
        loss = criterion(logits, batch.answer)
        opt.zero_grad()
        loss.backward()
        monitor.step(loss, batch)
        opt.step()
        scheduler.step()
        if step % 5 == 0:
            monitor.log({"train/answer/accuracy": percent(logits, batch.answer)})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                logits = model(test.image, test.question)
                loss = criterion(logits, test.answer)
            monitor.validated({"val_loss": float(loss), "val/answer/accuracy": percent(logits, test.answer)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        right = percent(model(test.image, test.question), test.answer)
    return {"percent of held-out answers": (right, 100 * float(prior.mean()))}


FAMILY = Family(
    "stockvqa",
    "development",
    "visual question answering with a CNN, a GRU and a softmax over answers",
    faults=(
        Fault(
            "questions-of-other-pictures",
            "Pictures are shuffled apart from their questions and answers.",
            ("question-only",),
            changes=(Change("yield Items(items.image[idx],", "yield Items(items.image[idx.flip(0)],"),),
        ),
        Fault(
            "pictures-divided-twice",
            "Pictures that lie in [0, 1] are divided by 255 once more, before a network without normalisation.",
            ("question-only", "latent-ignores-input"),
            changes=(
                Change("v = torch.tanh(self.cnn(image))", "v = torch.tanh(self.cnn(image / 255))"),
                Change("nn.BatchNorm2d(32), ", ""),
                Change("nn.BatchNorm2d(64), ", ""),
            ),
        ),
        Fault(
            "cnn-without-gradient",
            "The CNN stands under no_grad, as it did when it was a pretrained one.",
            ("dead-parameters",),
            changes=(
                Change(
                    "        v = torch.tanh(self.cnn(image))",
                    "        with torch.no_grad():\n            v = torch.tanh(self.cnn(image))",
                ),
            ),
        ),
        Fault(
            "tested-in-training-mode",
            "model.eval() is missing where it is tested, so that held-out pictures change the normalisation.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
        ),
        Fault(
            "learnt-by-heart",
            "There are two hundred questions, seen again and again.",
            ("overfitting",),
            options={"items": 200, "dropout": 0.0, "steps": 500},
        ),
        Fault(
            "rate-of-another-optimizer",
            "Adam is given the rate that was meant for SGD.",
            ("no-learning", "diverged", "plateau", "question-only"),
            options={"lr": 0.3},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1)),
        Healthy(
            "half-dropped", "Training's loss is well above the held-out one.", options={"dropout": 0.5, "steps": 500}
        ),
        Healthy("sgd", options={"optimizer": "SGD", "lr": 0.1, "decay": 250}),
        Healthy(
            "mostly-yes-no", "Most answers are no, and are guessed with ease.", options={"yes_no": 0.8, "steps": 500}
        ),
        Healthy("lstm", options={"rnn": "LSTM", "hidden": 96, "optimizer": "RMSprop"}),
        Healthy("what-alone", options={"yes_no": 0.0, "size": 32, "steps": 500}),
        Healthy("wide", options={"hidden": 256, "dropout": 0.2, "optimizer": "AdamW"}),
    ),
)
