"""A latent ODE (Rubanova et al. 2019) of oscillators that are looked at now and then.

A network that runs backwards over what was seen, with the time between looks, gives the posterior of a first state;
a small network is the derivative of the state, and Runge and Kutta's method leads it from one time to the next. Asked
for is what an oscillator does later.

Shapes: B series, T times, K of the early ones seen, d latent dimensions. A series is (T, 3): time, place, speed.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, cost_of_exchange
from intaglio.history import Measured, Reading

TIMES, EARLY, SECONDS = 14, 9, 3.5
"""Looks at an oscillator, of which those that are early may be seen by the encoder, and how long all of them take."""
SPEEDS, DAMPINGS = torch.tensor([1.2, 2.4]), torch.tensor([0.05, 0.7])
"""A kind of oscillator is one of each."""
KINDS = len(SPEEDS) * len(DAMPINGS)
NOISE = 0.08


def recordings(count: int, seed: int, views: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Series (N, T, 3), each oscillator ``views`` times at other times; their kinds and oscillators, (N,) each."""
    dice = torch.Generator().manual_seed(seed)
    kind = torch.randint(KINDS, (count,), generator=dice)
    a, b, c, d, e = torch.rand(5, count, generator=dice)
    speed, damping = SPEEDS[kind // 2] * (0.9 + 0.2 * a), DAMPINGS[kind % 2] * (0.7 + 0.6 * b)
    phase, height, level = 2 * math.pi * c, 0.8 + 0.6 * d, e - 0.5
    which = torch.arange(count).repeat_interleave(views)
    speed, damping, phase, height, level = (x[which, None] for x in (speed, damping, phase, height, level))
    times = (torch.arange(TIMES) + torch.rand(len(which), TIMES, generator=dice)) * SECONDS / TIMES
    wave, reach = speed * times + phase, height * (-damping * times).exp()
    values = torch.stack([level + reach * wave.cos(), -reach * (damping * wave.cos() + speed * wave.sin())], -1)
    values = values + NOISE * torch.randn(values.shape, generator=dice)
    return torch.cat([times[..., None], values], -1), kind[which], which


def looks(series: Tensor, count: int, dice: torch.Generator | None = None) -> Tensor:
    """Some of the early times of each series, in their order, with what was seen: (B, K, 3)."""
    which = torch.rand(len(series), EARLY, generator=dice).topk(count, 1).indices.sort(1).values
    return series.gather(1, which[..., None].expand(-1, -1, 3))


class LatentODE(nn.Module):
    def __init__(self, width: int, latent: int):
        super().__init__()
        self.gru = nn.GRU(3, width, batch_first=True)
        self.posterior = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * latent))
        self.derivative = nn.Sequential(nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, latent))
        self.decoder = nn.Linear(latent, 2)
        self.log_deviation = nn.Parameter(torch.full((2,), -1.0))

    def encode(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior of the state at time 0; with each look goes the time to the one before it."""
        times, values = seen[..., 0], seen[..., 1:]
        gaps = times.diff(dim=1, prepend=torch.zeros_like(times[:, :1]))
        states, _ = self.gru(torch.cat([values, gaps[..., None]], -1).flip(1))
        mean, log_variance = self.posterior(states[:, -1]).chunk(2, dim=1)
        return mean, (log_variance - 3).clamp(-8, 4)

    def solve(self, start: Tensor, times: Tensor) -> Tensor:
        """The states (B, T, d) at these times, by the method of Runge and Kutta with a step from each to the next."""
        f, z, path = self.derivative, start, []
        gaps = times.diff(dim=1, prepend=torch.zeros_like(times[:, :1]))
        for h in gaps[..., None].unbind(1):
            k1 = f(z)
            k2 = f(z + h / 2 * k1)
            k3 = f(z + h / 2 * k2)
            k4 = f(z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            path.append(z)
        return torch.stack(path, 1)

    def expect(self, start: Tensor, times: Tensor) -> Tensor:
        """The mean of place and speed at these times, (B, T, 2)."""
        values: Tensor = self.decoder(self.solve(start, times))
        return values

    def nll(self, start: Tensor, series: Tensor) -> Tensor:
        """Nats of each look, (B, T)."""
        off = (series[..., 1:] - self.expect(start, series[..., 0])) / self.log_deviation.exp()
        return (0.5 * off.square() + self.log_deviation + 0.5 * math.log(2 * math.pi)).sum(-1)


def draw(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def a_series(nats: Tensor) -> Tensor:
    """What a series costs, of the nats (B, T) of looks."""
    return nats.sum(1).mean()


def losses(model: LatentODE, seen: Tensor, series: Tensor, free: float) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Nats a series, and the first states with the posteriors that they are drawn from."""
    mean, log_variance = model.encode(seen)
    start = draw(mean, log_variance)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    terms = {"nll": a_series(model.nll(start, series)), "kl": kl.clamp_min(free) if free else kl}
    return terms, (start, mean, log_variance)


def later(model: LatentODE, seen: Tensor, series: Tensor, draws: int = 8) -> tuple[Tensor, Tensor]:
    """Of what comes after the early looks the log-likelihood a look, and the squared error of what is expected."""
    after = series[:, EARLY:]
    posterior = model.encode(seen)
    said = torch.stack([-model.nll(draw(*posterior), series)[:, EARLY:].sum(1) for _ in range(draws)])
    error = (model.expect(posterior[0], series[..., 0])[:, EARLY:] - after[..., 1:]).square().mean((1, 2))
    return (said.logsumexp(0) - math.log(draws)) / after.shape[1], error


def guessed(seen: Tensor, series: Tensor) -> float:
    """The error after the early looks where the last or the mean of those seen is said, the better."""
    after, values = series[:, EARLY:, 1:], seen[..., 1:]
    return min(float((after - guess).square().mean()) for guess in (values[:, -1:], values.mean(1, keepdim=True)))


def probed(model: LatentODE, seen: Tensor, kinds: Tensor, held: Tensor, held_kinds: Tensor) -> Reading:
    """How many held-out kinds a linear map of posterior means names, beside the commonest kind."""

    def features(looked_at: Tensor) -> Tensor:
        mean = model.encode(looked_at)[0]
        return torch.cat([mean, torch.ones_like(mean[:, :1])], 1).double()

    x, y = features(seen), nn.functional.one_hot(kinds, KINDS).double()
    ridge = 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    named = (features(held) @ torch.linalg.solve(x.T @ x + ridge, x.T @ y)).argmax(1)
    commonest = held_kinds == kinds.mode().values
    return Reading(float((named == held_kinds).double().mean()), float(commonest.double().mean()), len(held))


def share_of_rate(step: int, steps: int, turn: int, schedule: str, warmup: int) -> float:
    """Of the full rate; ``turn`` steps are an epoch."""
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    if schedule == "restarts":
        return rise * (0.55 + 0.45 * math.cos(math.pi * (4 * step / steps % 1)))
    if schedule == "exponential":
        return rise * 0.88 ** (step // turn)
    return rise


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, count: int = 1200, rate: float = 1e-2,
    width: int = 48, latent: int = 6, shown: int = 6, beta: float = 1.0, hold: int = 100, ramp: int = 150,
    free: float = 0.0, clip: float = 50.0, odd: int = 0, optimizer: str = "Adam", schedule: str = "cosine",
    warmup: int = 10,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    series, kinds, oscillator = recordings(count, seed)
    held = oscillator % 8 == 0
    values = series[~held][..., 1:]
    series[..., 1:] = (series[..., 1:] - values.mean((0, 1))) / values.std((0, 1))
    x, held_out, x_kinds, held_kinds = series[~held], series[held], kinds[~held], kinds[held]
    dice = torch.Generator().manual_seed(seed)
    held_seen, x_seen = looks(held_out, shown, dice), looks(x[:768], shown, dice)
    plain = -torch.distributions.Normal(0.0, 1.0).log_prob(held_out[..., 1:]).sum(-1)
    null, naive = float(a_series(plain)), guessed(held_seen, held_out)

    model = LatentODE(width, latent)
    parts = (model.gru, model.posterior, model.derivative, model.decoder)
    parameters = [model.log_deviation, *(p for part in parts for p in part.parameters())]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(parameters, lr=rate, **more)
    turn = len(x) // size
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: share_of_rate(k, steps, turn, schedule, warmup))

    def read(model: Any, probe: Tensor) -> dict[str, dict[str, Measured]]:
        of_probe = held_out[: len(probe)]
        mean, log_variance = model.encode(probe)

        def nats(start: Tensor) -> tuple[Any, Any]:
            each = model.nll(start, of_probe).double()
            return each.sum(1).numpy(), torch.ones(len(each)).double().numpy()

        def errors(values: Tensor) -> Any:
            seen = torch.cat([probe[..., :1], values], -1)
            return later(model, seen, of_probe, 1)[1].double().numpy()

        found = panel.latents(mean, log_variance)
        found["prior_nats"] = bottleneck.aggregate_nats(mean, log_variance)
        if free:
            found["kl_charged"] = bottleneck.kl_charged(mean, log_variance, free, 1)
            found["groups_above_floor"] = bottleneck.groups_above_floor(mean, log_variance, free, 1)
        exchanged = cost_of_exchange(nats, draw(mean, log_variance))
        costs = cost_of_context(errors, probe[..., 1:])
        return {
            "val/latent": found | {f"{other}_latent_nats": cost for other, cost in exchanged.items()},
            "val/later": {f"context_{change}": cost for change, cost in costs.items()},
            "val/kind": {"accuracy": probed(model, x_seen, x_kinds[: len(x_seen)], held_seen, held_kinds)},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_seen[:192], read=read, every=50, log_every=5, steps=steps,
        nulls={"nll": null, "val/later/error": naive},
    )  # fmt: skip
    names = [[str(k).encode() for k in oscillator[side].tolist()] for side in (~held, held)]
    monitor.audit(leaks={"the same oscillator": audits.leaks(*names)})
    step = 0
    while step < steps:
        for rows in torch.randperm(len(x)).split(size)[:turn]:
            step += 1
            batch = x[rows] * torch.tensor([1.0, 5.0, 5.0]) if step == odd else x[rows]
            weight = beta * min(1.0, max(0, step - hold) / ramp) if ramp else beta
            model.train()
            terms, latents = losses(model, looks(batch, shown), batch, free)
            weighted = {"nll": (terms["nll"], 1.0), "kl": (terms["kl"], weight)}
            total = terms["nll"] + weight * terms["kl"]
            monitor.before_backward(weighted)
            optim.zero_grad()
            total.backward()
            monitor.step({**weighted, "total": total}, batch)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optim.step()
            rates.step()
            if step % 50 == 0:
                noise = bottleneck.noise_ratio(*latents)
                monitor.log({"train/latent/noise_ratio": noise} if isinstance(noise, Reading) else {})
                model.eval()
                with monitor.validation(), torch.no_grad():
                    terms, _ = losses(model, held_seen, held_out, free)
                    said, error = later(model, held_seen, held_out)
                monitor.validated({f"val/loss/{name}": float(value) for name, value in terms.items()})
                monitor.validated({"later_log_likelihood": float(said.mean()), "val/later/error": float(error.mean())})
            if step == steps:
                break
    monitor.close()
    model.eval()
    with torch.no_grad():
        said, error = later(model, held_seen, held_out, 32)
        kind = probed(model, x_seen, x_kinds[: len(x_seen)], held_seen, held_kinds)
    return {
        "share of the error of the last value or the mean that forecasts lack": (1 - float(error.mean()) / naive, 0.0),
        "log-likelihood of later looks": (float(said.mean()), -float(plain[:, EARLY:].mean())),
        "kinds that a linear probe names": (kind.value, kind.null or 0.0),
    }


FAMILY = Family(
    "latentode",
    "development",
    "a latent ODE of oscillators that are looked at now and then",
    faults=(
        Fault(
            "encoder-of-zeros",
            "The encoder is given an empty tensor that was meant to be filled with values and gaps.",
            ("latent-ignores-input", "posterior-collapse", "dead-parameters", "context-order-inert"),
            changes=(
                Change(
                    "self.gru(torch.cat([values, gaps[..., None]], -1).flip(1))", "self.gru(torch.zeros_like(seen))"
                ),
            ),
            case="E latent-ignores-input",
        ),
        Fault(
            "not-batch-first",
            "The GRU takes the batch for time, so that of what was seen only the earliest look reaches the posterior.",
            ("context-order-inert",),
            changes=(Change("nn.GRU(3, width, batch_first=True)", "nn.GRU(3, width)"),),
        ),
        Fault(
            "likelihood-averaged-over-times",
            "The likelihood is a mean over times beside a KL that is a sum, so the KL weighs fourteen times too much.",
            ("posterior-collapse", "kl-units", "term-dominates", "decoder-ignores-latent"),
            changes=(Change("return nats.sum(1).mean()", "return nats.mean()"),),
        ),
        Fault(
            "means-in-training",
            "The decoder is given the posterior's means in training too, as it was while the code was tried out.",
            ("temperature-misstates-rate",),
            changes=(Change("start = draw(mean, log_variance)", "start = mean"),),
        ),
        Fault(
            "derivative-not-in-the-optimizer",
            "The parts that are trained were listed by hand, and the derivative's network was forgotten.",
            ("not-in-optimizer",),
            changes=(Change("model.posterior, model.derivative, model.decoder)", "model.posterior, model.decoder)"),),
        ),
        Fault(
            "first-state-at-every-time",
            "The solver keeps the state that it began with, and not the one that it has come to.",
            ("dead-parameters",),
            changes=(Change("path.append(z)", "path.append(start)"),),
        ),
        Fault(
            "warm-up-only-logged",
            "The KL's weight is warmed up in the log, and the loss that is trained on has it at 1 all along.",
            ("weight-not-applied",),
            changes=(Change('terms["nll"] + weight * terms["kl"]', 'terms["nll"] + terms["kl"]'),),
            options={"ramp": 300},
            case="V weight-not-applied",
        ),
        Fault(
            "warm-up-in-epochs",
            "The KL's warm-up of 150 steps is counted in epochs, and the run ends when it has hardly begun.",
            ("stopped-in-ramp",),
            changes=(Change("max(0, step - hold) / ramp", "max(0, step // turn - hold) / ramp"),),
            options={"hold": 0},
            minor=True,
        ),
        Fault(
            "decay-for-each-batch",
            "The rate's decay is meant for each epoch and made after each batch.",
            ("learning-rate-off",),
            changes=(Change("0.88 ** (step // turn)", "0.88**step"),),
            options={"schedule": "exponential"},
        ),
        Fault(
            "split-by-recording",
            "Recordings are split at random, and of most held-out oscillators the other recording is trained on.",
            ("split-leak",),
            changes=(Change("held = oscillator % 8 == 0", "held = torch.rand(len(series)) < 1 / 8"),),
        ),
        Fault(
            "times-in-milliseconds",
            "The recorder's clock counts milliseconds, and as such its times go into a solver that expects seconds.",
            ("non-finite",),
            changes=(
                Change(
                    "return torch.cat([times[..., None], values], -1),",
                    "return torch.cat([1000 * times[..., None], values], -1),",
                ),
            ),
        ),
    ),
    healthy=(
        Healthy(
            "plain",
            "The KL's weight is 0 at first, and the KL falls as it rises.",
            seeds=(0, 1, 2, 3, 4),
        ),
        Healthy("held-long", "The KL has no weight for half of the run.", options={"hold": 200}, seeds=(0, 1)),
        Healthy("adamw", options={"optimizer": "AdamW", "rate": 8e-3, "schedule": "constant"}, seeds=(0, 1, 2)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 3e-3}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("decay", "The rate falls after each epoch.", options={"schedule": "exponential"}, seeds=(0, 1)),
        Healthy("free-nats", "The KL is parked at its free nats.", options={"free": 12.0}, seeds=(0, 1)),
        Healthy("few-oscillators", "A small set, seen often.", options={"count": 320, "width": 32}, seeds=(0, 1)),
        Healthy("wide", options={"width": 64, "latent": 10, "rate": 6e-3}, seeds=(0, 1)),
        Healthy("eight-looks", "Nearly all that is early is seen.", options={"shown": 8, "size": 48}, seeds=(0, 1)),
        Healthy("odd-batch", "One batch was recorded with five times the gain.", options={"odd": 230}),
    ),
)
