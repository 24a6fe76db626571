"""The command line: words to verbs, results to text or JSON, errors to one line that says what to do.

Exit codes: 0 no failing finding, 1 failing, 2 unusable input or arguments, 3 cannot tell, 130 and 143 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from intaglio import __version__
from intaglio.cli import analysing, remedying, sweeping
from intaglio.cli.analysing import print_json

Arguments = argparse.Namespace


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code."""
    parser, verbs = _parser()
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] in TAKES_OVERRIDES:
        words = _with_values(words, verbs[words[0]])
    given, rest = parser.parse_known_args(words)
    if rest and given.verb not in TAKES_OVERRIDES:
        parser.error(f"{given.verb} does not know {' '.join(rest)}; see: intaglio {given.verb} --help")
    if not given.verb:
        parser.print_help()
        return 0
    given.overrides = rest
    try:
        return int(VERBS[given.verb](given) or 0)
    except (ValueError, OSError) as error:
        if os.environ.get("INTAGLIO_DEBUG"):
            raise
        print(f"intaglio {given.verb}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ not in {"NonFiniteStep", "OutOfMemoryError"} or os.environ.get("INTAGLIO_DEBUG"):
            raise
        print(f"intaglio {given.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nintaglio {given.verb}: interrupted", file=sys.stderr)
        return 130


def _train(a: Arguments) -> int:
    if a.print_config:
        from intaglio import config

        if a.resume or a.parent or a.dry_run:
            raise ValueError("--print_config prints what a recipe is; leave --resume, --from and --dry-run out.")
        if a.recipe is None:
            raise ValueError(f"Which recipe? One of: {', '.join(config.recipes())}.")
        resolved = config.load(a.recipe, a.overrides)
        if a.json:
            print_json(config.to_dict(resolved))
        else:
            print(config.dump(resolved), end="")
        return 0
    from intaglio.api import train

    options: dict[str, Any] = {"resume": a.resume, "parent": a.parent, "dry_run": a.dry_run}
    if a.autopilot is not None:
        options = {"autopilot": a.autopilot} | {name: value for name, value in options.items() if value}
    folder = train(a.recipe, a.overrides, quiet=a.quiet or a.json, **options)
    if folder is None:
        if a.json:
            print_json({"run": None, "status": "dry run", "step": 0})
        return 0
    record = folder.record
    if a.json:
        print_json({"run": str(folder.path), "status": record["status"], "step": record["step"]})
    stopped = record.get("stopped_by") or ""
    return 1 if stopped.startswith("health: ") else {"SIGINT": 130, "SIGTERM": 143}.get(stopped, 0)


def _check(a: Arguments) -> int:
    from intaglio.api import check
    from intaglio.health.check import report_lines

    report = check(a.recipe, a.overrides)
    if a.json:
        print_json(report.as_dict())
    else:
        print("\n".join(report_lines(report)))
    return int(any(f.severity == "fail" for f in report.findings))


def _demo(a: Arguments) -> int:
    from intaglio.api import demo

    demo(a.out, quiet=a.quiet)
    return 0


def _evaluate(a: Arguments) -> int:
    from intaglio.api import evaluate

    readings, lines = evaluate(a.run)
    if a.json:
        print_json({"readings": {name: asdict(r) for name, r in readings.items()}})
    else:
        print("\n".join(lines))
    from intaglio.history import run_folder

    findings = json.loads((run_folder.find(a.run).path / "findings.json").read_text(encoding="utf-8"))
    return int(findings["verdict"] == "failing")


def _caption(a: Arguments) -> int:
    from intaglio.api import caption
    from intaglio.files import Skipped
    from intaglio.sampling.tokens import Decoding

    options = {
        k: getattr(a, k) for k in ("temperature", "top_p", "beams", "repetition_penalty") if getattr(a, k) is not None
    }
    if a.method == "beam":
        options.setdefault("beams", 4)
    skipped = Skipped()
    found = caption(a.run, a.images, Decoding(method=a.method, **options), a.seed, skipped)
    if a.json:
        print_json({"captions": found, "skipped": skipped.reasons})
    else:
        for file, words in found.items():
            print(f"{file}\t{words}")
    return _tell_skipped(skipped, found)


def _generate(a: Arguments) -> int:
    from intaglio.api import generate, prove

    options = ("temperature", "guidance", "label", "interval", "rescale", "sampler", "steps", "eta")
    given = {k: getattr(a, k) for k in options if getattr(a, k) is not None}
    if a.all_proofs:
        if given or a.text or (a.n, a.seed) != (16, 0):
            raise ValueError("--all-proofs makes the run's own pictures: of the other options it takes --out alone.")
        pictures = prove(a.run, a.out)
        if a.json:
            print_json({"folder": a.out, "pictures": [str(path) for path in pictures]})
        else:
            print("\n".join(map(str, pictures)))
        return 0
    rows = generate(a.run, a.out, a.n, a.seed, a.text, **given)
    if a.json:
        print_json({"folder": a.out, "images": rows})
    else:
        for row in rows:
            print(f"{a.out}/{row['file_name']}\t{row.get('label', row.get('caption', ''))}")
        if "note" in rows[0]:
            print(f"note: {rows[0]['note']}", file=sys.stderr)
    return 0


def _interpolate(a: Arguments) -> int:
    from intaglio.api import interpolate

    captions = interpolate(a.run, a.a, a.b, a.out, a.steps)
    if a.json:
        print_json({"folder": a.out, "captions": captions})
    else:
        print("\n".join(captions))
        print(f"{a.out}/sheet.png")
    return 0


def _reconstruct(a: Arguments) -> int:
    from intaglio.api import reconstruct
    from intaglio.files import Skipped

    skipped = Skipped()
    quality = reconstruct(a.run, a.images, a.out, skipped, a.t, a.seed)
    if a.json:
        print_json({"folder": a.out, "psnr_db": quality, "skipped": skipped.reasons})
    else:
        for file, decibels in quality.items():
            print(f"{file}\t{decibels:.2f} dB")
    return _tell_skipped(skipped, quality)


def _search(a: Arguments) -> int:
    from intaglio.api import search
    from intaglio.files import Skipped

    skipped = Skipped()
    hits = search(a.run, a.folder, a.text, a.image, a.top, skipped, a.task, a.out)
    if a.json:
        print_json({"hits": hits, "skipped": skipped.reasons})
    else:
        for hit in hits:
            name = hit.get("file") or hit.get("task") or f"{hit['item']}  {hit['caption']}"
            print(f"{hit['similarity']:.3f}  {name}")
    return _tell_skipped(skipped, hits)


def _encode(a: Arguments) -> int:
    from intaglio.api import encode
    from intaglio.files import Skipped

    skipped = Skipped()
    rows, width = encode(a.run, a.images, a.out, skipped)
    if a.json:
        print_json({"file": a.out, "rows": rows, "width": width, "skipped": skipped.reasons})
    else:
        print(f"{a.out}: {rows} latents of {width} dimensions")
    return _tell_skipped(skipped, rows)


def _answer(a: Arguments) -> int:
    from intaglio import answering

    if (a.image is None) == (a.table is None):
        raise ValueError("Give an image and questions about it, or --table FILE with a row for each question.")
    if a.table is not None:
        columns = dict(word.partition("=")[::2] for word in a.columns)
        rows = answering.answer_table(a.run, a.table, columns, a.closed)
        if a.out:
            answering.write_table(Path(a.out), rows)
    else:
        rows = answering.answer(a.run, a.image, a.question, a.samples, a.closed, a.explain)
    if a.json:
        print_json({"answers": rows})
    elif not (a.table and a.out):
        for row in rows:
            print(_answered(row))
    skipped = [row for row in rows if "skipped" in row]
    for row in skipped:
        print(f"skipped: {row['image']}: {row['skipped']}", file=sys.stderr)
    for row in rows:
        if "note" in row:
            print(f"note: {row['question']}: {row['note']}", file=sys.stderr)
    return 0 if len(skipped) < len(rows) else 2


def _answered(row: Mapping[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['image']}\t{row['question']}\t–"
    spread = "".join(f"  {answer} {share:.0%}" for answer, share in row.get("spread", {}).items())
    where = f"{row['image']}\t" if "image" in row else ""
    return f"{where}{row['question']}\t{row['answer']}\t{row['probability']:.3f}{spread}"


def _export(a: Arguments) -> int:
    from intaglio.puzzles import export

    told = export(a.run, a.out)
    if a.json:
        print_json({"folder": a.out, **told})
    else:
        print(f"{a.out}: {told['used']} of {told['codes']} codes in use, {len(told['pictures'])} pictures")
    return 0


def _bench(a: Arguments) -> int:
    from intaglio.bench import run_benchmark

    options: dict[str, Any] = {}
    if a.what == "faults":
        options = {"level": a.level, "jobs": a.jobs, "only": a.only or (), "more": a.more, "minutes": a.minutes}
    elif a.level != "full" or a.more or a.minutes:
        raise ValueError("--level, --more and --minutes are options of intaglio bench faults.")
    elif a.what == "remedies":
        options = {"jobs": a.jobs, "only": a.only or ()}
    elif a.jobs or a.only:
        raise ValueError("--jobs and --only are options of intaglio bench faults and remedies.")
    return run_benchmark(a.what, a.out, a.data, **options)


VERBS = {
    "train": _train,
    "check": _check,
    "demo": _demo,
    "evaluate": _evaluate,
    **analysing.VERBS,
    **sweeping.VERBS,
    **remedying.VERBS,
    "caption": _caption,
    "generate": _generate,
    "interpolate": _interpolate,
    "reconstruct": _reconstruct,
    "search": _search,
    "encode": _encode,
    "export": _export,
    "answer": _answer,
    "bench": _bench,
}
TAKES_OVERRIDES = {"train", "check", "sweep"}


def _with_values(words: Sequence[str], verb: argparse.ArgumentParser) -> list[str]:
    """``--key.sub value`` as ``--key.sub=value``: argparse takes the value of an unknown key for a recipe."""
    joined, rest = [], iter(words)
    for word in rest:
        alone = word.startswith("--") and "=" not in word and word not in verb._option_string_actions
        joined.append("=".join([word, *islice(rest, 1)]) if alone else word)
    return joined


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line's parser, and that of each verb."""
    parser = argparse.ArgumentParser(
        prog="intaglio", description="Train latent-variable models, and prove what they learned."
    )
    parser.add_argument("--version", action="version", version=f"intaglio {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}. {more}".strip())
        if name not in {"demo", "bench"}:
            p.add_argument("--json", action="store_true", help="print the answer as JSON")
        return p

    overriding = "Any key of the recipe can be set: --train.steps 500 (see --print_config for all of them)."
    p = verb("train", "train a recipe, go on with a run, or fine-tune one", overriding)
    p.add_argument("recipe", nargs="?", help="name of a recipe, or the path of a YAML file")
    p.add_argument("--resume", metavar="RUN", help="go on with a run (or a checkpoint of it), bit for bit")
    p.add_argument("--from", dest="parent", metavar="RUN", help="fine-tune the model of a run with a fresh optimizer")
    p.add_argument("--dry-run", action="store_true", help="prepare everything and take one step; writes nothing")
    p.add_argument(
        "--autopilot", type=float, nargs="?", const=2.0, metavar="SHARE",
        help="where a rule fails, try its remedies beside a control and go on with what helps; trials may take that "
        "share of the run's steps (2)",
    )  # fmt: skip
    p.add_argument("--quiet", action="store_true", help="say only what must be said")
    p.add_argument("--print_config", action="store_true", help="print the configuration and stop")

    p = verb("check", "parameters, memory, time and faults of a recipe before a step is spent", overriding)
    p.add_argument("recipe")

    p = verb("demo", "train a small model on the built-in engravings and open the page of it")
    p.add_argument("--out", default="runs", metavar="FOLDER", help="where the run folder goes (default: runs)")
    p.add_argument("--quiet", action="store_true")

    p = verb("evaluate", "measure a finished run on its held-out items, each number beside its null")
    p.add_argument("run")

    analysing.add(verb)
    sweeping.add(verb)
    remedying.add(verb)

    p = verb("caption", "caption images")
    p.add_argument("run")
    p.add_argument("images", nargs="+", help="image files or folders")
    p.add_argument("--method", choices=("greedy", "sample", "beam"), default="greedy")
    p.add_argument("--temperature", type=float, help="of sampling")
    p.add_argument("--top-p", type=float, help="share of probability that sampling keeps")
    p.add_argument("--beams", type=int, help="hypotheses of the beam search (4)")
    p.add_argument("--repetition-penalty", type=float, help="1 is off")
    p.add_argument("--seed", type=int, help="of sampling (0)")

    p = verb("generate", "new images from seeds: of a class, from a text, or whatever the model draws")
    p.add_argument("run")
    p.add_argument("--out", default="generated", metavar="FOLDER")
    p.add_argument("--n", type=int, default=16, help="how many (16)")
    p.add_argument("--seed", type=int, default=0, help="of the first one (0)")
    p.add_argument("--text", help="what the images shall show")
    p.add_argument("--class", dest="label", metavar="CLASS", help="of diffusion: a class (default: each in turn)")
    p.add_argument(
        "--cfg", "--guidance", dest="guidance", type=float, help="how far they follow it; 1 as far as learnt"
    )
    p.add_argument("--interval", type=float, nargs=2, metavar="LOG_SNR", help="of diffusion: guide between these only")
    p.add_argument("--rescale", type=float, help="of diffusion: draws guided contrast back, 0 to 1")
    p.add_argument("--sampler", choices=("ddim", "ddpm", "heun", "dpm-solver++"), help="of diffusion (dpm-solver++)")
    p.add_argument("--steps", type=int, help="of the sampler of diffusion (20)")
    p.add_argument("--eta", type=float, help="of ddim and ddpm: share of fresh noise, 0 to 1")
    p.add_argument("--temperature", type=float, help="of multimodal: spread of the latents (0.8)")
    p.add_argument("--all-proofs", action="store_true", help="instead: make every proof of the run anew, into --out")

    p = verb("interpolate", "images and captions on the way between two images")
    p.add_argument("run")
    p.add_argument("a")
    p.add_argument("b")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--out", default="interpolated", metavar="FOLDER")

    p = verb("reconstruct", "images decoded from their own latents, or noised and denoised again, with PSNR")
    p.add_argument("run")
    p.add_argument("images", nargs="+")
    p.add_argument("--t", type=int, help="of diffusion: noise level to start from, below noise.steps (half of it)")
    p.add_argument("--seed", type=int, default=0, help="of diffusion: of the first image's noise (0)")
    p.add_argument("--out", default="reconstructed", metavar="FOLDER")

    p = verb("search", "the images that fit a text or an image best, or the tasks with the most similar rule")
    p.add_argument("run")
    p.add_argument("--in", dest="folder", metavar="FOLDER", help="where to search (default: the run's held-out items)")
    p.add_argument("--text")
    p.add_argument("--image")
    p.add_argument("--task", help="of a JEPA: a JSON file, or the name of a task")
    p.add_argument("--top", type=int, default=5)
    p.add_argument("--out", metavar="PNG", help="of a JEPA: a picture of the tasks")

    p = verb("encode", "latents of images, or rules and codes of tasks, streamed into one file")
    p.add_argument("run")
    p.add_argument("images", nargs="+", help="files or folders of images, or of tasks")
    p.add_argument("--out", default="latents.safetensors", help=".safetensors or .parquet")

    p = verb("export", "the codebook of a JEPA, with pictures of what each code stands for")
    p.add_argument("run")
    p.add_argument("--out", default="codes", metavar="FOLDER")

    p = verb("answer", "answer questions about an image, or a table of questions about several")
    p.add_argument("run")
    p.add_argument("image", nargs="?", help="an image file")
    p.add_argument("question", nargs="*", help="one or more, each in quotes")
    p.add_argument("--samples", type=int, default=0, metavar="K", help="draw the latents K times: how answers spread")
    p.add_argument("--explain", metavar="PNG", help="a picture of the places and latents that an answer rests on")
    p.add_argument("--closed", action="store_true", help="the likeliest of the answers that training had")
    p.add_argument("--table", metavar="FILE", help="CSV, TSV, JSON or JSON Lines with question and image")
    p.add_argument("--columns", nargs="*", default=[], metavar="ROLE=NAME", help="of the table, where unusual")
    p.add_argument("--out", metavar="CSV", help="of --table: where the answers go, instead of being printed")

    p = verb("bench", "our own evidence: speed, targets of a system, false alarms, verdicts on labelled histories")
    systems = ("multimodal", "diffusion", "jepa", "vqa")
    healthy = ("healthy", *(f"healthy-{system}" for system in systems[1:]))
    p.add_argument("what", choices=("faults", "remedies", "speed", *systems, *healthy, "histories", "comparisons"))
    what = "of histories: a folder with labels.json; of diffusion: one of labelled photos; of jepa: one of ARC's "
    what += "tasks; of vqa: one of images and questions"
    p.add_argument("--data", metavar="FOLDER", help=what)
    p.add_argument("--out", default="benchmarks", metavar="FOLDER")
    p.add_argument("--level", choices=("smoke", "full"), default="full", help="of faults: some minutes, or everything")
    p.add_argument(
        "--jobs", type=int, metavar="N", help="of faults and remedies: trainings at once (one for each core)"
    )
    p.add_argument(
        "--only", action="append", metavar="FAMILY", help="of faults and remedies: this family (may be repeated)"
    )
    p.add_argument("--minutes", type=float, metavar="N", help="of faults: begin no other training after that long")
    p.add_argument("--more", metavar="FOLDER", help="of faults: Python files with families of your own")
    return parser, verbs.choices


def _tell_skipped(skipped: Any, found: Any) -> int:
    for reason in skipped.reasons.values():
        print(f"skipped: {reason}", file=sys.stderr)
    return 0 if found else 2
