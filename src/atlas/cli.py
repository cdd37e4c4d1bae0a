"""`atlas COMMAND ...`: every command with its arguments, and the module that does it.

That module is imported only when its command runs, so that `--help` answers at once; `python -m MODULE` is the same command.
"""

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

from atlas import __version__
from atlas.errors import DONE, WRONG_INPUT, run_main

_MODEL = "FOLDER|REPO[@REVISION]"


class Command(NamedTuple):
    """A command: the module whose `main(argv)` it is (or `module:function`), what it does, what adds its arguments to a parser."""

    place: str
    what: str
    add_arguments: Callable[[ArgumentParser], object]


class Main(Protocol):
    """Runs a command and returns its exit status; `argv`: its arguments, by default those of the process."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def command(name: str) -> Callable[[Callable[[Namespace], int]], Main]:
    """Makes the `main(argv)` of the command `name` from a function of its arguments that returns the exit status, or raises
    `UserError` or `RunError`."""

    def decorate(run: Callable[[Namespace], int]) -> Main:
        def main(argv: Sequence[str] | None = None) -> int:
            arguments = parse(name, argv)
            loud = {name: getattr(arguments, name, False) for name in ("quiet", "verbose")}
            return run_main(lambda: run(arguments), **loud)

        return main

    return decorate


def parse(name: str, argv: Sequence[str] | None) -> Namespace:
    """The arguments of `atlas NAME`; of a training phase, where `COMMANDS` does not have the name."""
    _, what, add_arguments = COMMANDS.get(name, Command("", f"training, phase {name}", _training))
    parser = ArgumentParser(prog=f"atlas {name}", description=what[0].upper() + what[1:])
    add_arguments(parser)
    # Overrides may stand between options, for which argparse has a function of its own.
    arguments = (parser.parse_intermixed_args if parser.get_default("takes_config") else parser.parse_args)(argv)
    if getattr(arguments, "preset", None) is not None:
        arguments.overrides.insert(0, f"preset={arguments.preset}")
    if getattr(arguments, "max_steps", None) is not None:
        arguments.overrides.append(f"train.max_steps={arguments.max_steps}")
    if getattr(arguments, "no_push_to_hub", False):
        arguments.overrides.append("output.hub_repo=null")
    return arguments


def _number_from_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _config(parser: ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file; the base.yaml beside it is merged under it")
    _overrides(parser)


def _overrides(parser: ArgumentParser, what: str = "a value of the config, e.g. train.seed=1") -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=what)
    about = "values for a kind of machine, below the config's own: t4, a100, cpu; smoke: a short run"
    parser.add_argument("--preset", metavar="NAME", help=about)
    parser.set_defaults(takes_config=True)


def _loudness(parser: ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="print only warnings, errors and the last line")
    how.add_argument("--verbose", action="store_true", help="print the libraries' messages, too")


def _run(parser: ArgumentParser) -> None:
    """Of a training run, and of the look at it beforehand."""
    _config(parser)
    _loudness(parser)
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="checkpoint (default: auto, the newest)"
    )
    parser.add_argument("--no-push-to-hub", action="store_true", help="keep the result on this machine")


def _of_training(parser: ArgumentParser) -> None:
    """Of a training run, and of what tries it."""
    _run(parser)
    # At least 1: transformers takes 0 and below for "not set" and would train whole epochs.
    parser.add_argument("--max-steps", type=_number_from_1, metavar="N", help="stop after N steps (train.max_steps)")


def _training(parser: ArgumentParser) -> None:
    _of_training(parser)
    parser.add_argument("--dump-template-audit", action="store_true", help="write the audit of the data and stop")
    parser.add_argument("--print-config", action="store_true", help="print the config with the source of each value")


def _init(parser: ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    about = "what atlas brings along: sft_qwen05b.yaml, slurm.sbatch, ... (default: own_data.yaml, as sft.yaml)"
    parser.add_argument("--like", default="own_data.yaml", metavar="NAME", help=about)


def _audit(parser: ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", help="audit the data of this config; writes results/sft_template_audit.jsonl and .html"
    )
    names = ("A.jsonl", "B.jsonl")
    what.add_argument("--diff", nargs=2, type=Path, metavar=names, help="do two audits have the same ids and labels?")
    _overrides(parser)


def _eval(parser: ArgumentParser) -> None:
    _config(parser)
    _loudness(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--base", action="store_true", help="score the base model of the config")
    what.add_argument("--adapter", metavar=_MODEL, help="default: output.dir of the config")
    what.add_argument("--merged", metavar=_MODEL, help="score a whole model")
    parser.add_argument("--name", help="its name in the results (default: from model or adapter)")
    parser.add_argument("--tasks", help="comma-separated, instead of eval.tasks")
    parser.add_argument("--limit", type=_number_from_1, metavar="N", help="only the first N prompts of each task")
    parser.add_argument("--replace", action="store_true", help="discard other results of the same name")


def _compare(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="NAME", help="the others are compared with the first")
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="(default: %(default)s)")
    parser.add_argument("--task", help="only this one")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N prompts on which the two differ")


def _winrate(parser: ArgumentParser) -> None:
    for label in ("a", "b"):
        what = "an adapter, a run's folder, or a base or merged model"
        parser.add_argument(label, metavar=label.upper(), help=f"{what} ({_MODEL})")
    rows = "JSONL: `prompt` as text or messages, preference rows, or rows of IFEval"
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help=rows)
    parser.add_argument("--limit", type=_number_from_1, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--max-new-tokens", type=_number_from_1, default=1280, metavar="N", help="of a reply (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=_number_from_1, default=16, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--load-in-4bit", action="store_true", help="answer on the 4-bit base, as QLoRA has it")
    parser.add_argument(
        "--reward-model", metavar="FOLDER|REPO[@REVISION]", help="judge: a sequence classifier with one output"
    )
    url = "judge: an OpenAI-compatible endpoint, http://HOST:PORT/v1; the key comes from ATLAS_JUDGE_API_KEY"
    parser.add_argument("--judge-url", metavar="URL", help=url)
    parser.add_argument("--judge-model", metavar="NAME", help="the endpoint's name of its model")
    parser.add_argument(
        "--judge-parallel",
        type=_number_from_1,
        default=4,
        metavar="N",
        help="requests at a time (default: %(default)s)",
    )
    parser.add_argument("--judge-timeout", type=float, default=300, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument(
        "--judge-max-tokens", type=_number_from_1, default=1024, metavar="N", help="of an answer (default: %(default)s)"
    )
    price = "per million tokens, for the estimate"
    parser.add_argument("--judge-price", type=float, nargs=2, metavar=("IN", "OUT"), help=price)
    parser.add_argument("--estimate", action="store_true", help="say what it would take, and stop")
    where = "results, replies and the judge's answers (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path("results/winrate"), metavar="DIR", help=where)
    _loudness(parser)


def _report(parser: ArgumentParser) -> None:
    about = "output.dir of a run, finished or not; several are shown side by side"
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=about)
    default = "report.html in the folder; of several, reports.html beside the first"
    parser.add_argument("--to", type=Path, metavar="FILE", help=f"(default: {default})")


def _experiment(parser: ArgumentParser) -> None:
    about = "output.dir of a run that is finished and scored, or the results folder of a pipeline"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=about)
    parser.add_argument("--hypothesis", metavar="TEXT", help="what was expected, and why (default: to be filled in)")
    parser.add_argument("--title", metavar="TEXT", help="(default: the name of the run or of the pipeline)")
    where = "folder of the log (default: docs/experiments where that exists, else experiments)"
    parser.add_argument("--to", type=Path, metavar="DIR", help=where)


def _generate(parser: ArgumentParser) -> None:
    parser.add_argument(
        "prompt", nargs="?", help="the question; `-` reads it from standard input; none: a conversation"
    )
    parser.add_argument("--adapter", metavar=_MODEL, help="the tuned adapter; it knows its base model")
    parser.add_argument("--model", metavar=_MODEL, help="base or merged model (default: the adapter's)")
    parser.add_argument("--system", help="system prompt (default: the chat template's own)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, help="for a temperature above 0 (default: 0)")


def _push(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo", metavar="namespace/name")
    parser.add_argument("--public", action="store_true", help="if the repo has to be created, make it public")


def _pull(parser: ArgumentParser) -> None:
    parser.add_argument("repo", metavar="namespace/name[@revision]")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: outputs/name")


def _merge(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="FOLDER|namespace/name[@revision]")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    dtypes = ("auto", "float16", "bfloat16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the saved weights (default: the base's)")
    parser.add_argument("--base", metavar="NAME", help="the base model, if it is not where the manifest says")


def _cache(parser: ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove all of it that no other process uses")


def _plan(parser: ArgumentParser) -> None:
    default = "configs/sft_qwen05b.yaml"
    parser.add_argument("--config", default=default, help="its model, adapter and batch (default: %(default)s)")
    sizes = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
    shape = "instead of model.name: a public shape, which needs no download: Qwen2.5-0.5B ... Qwen2.5-72B"
    parser.add_argument("--shape", choices=[f"Qwen2.5-{size}" for size in sizes], metavar="NAME", help=shape)
    about = "instead of this machine: T4, L4, A100, H100, 24GB or 80GB"
    parser.add_argument("--gpu", choices=("T4", "L4", "A100", "H100", "24GB", "80GB"), metavar="NAME", help=about)
    count = "processes in all (default: 1); with several, each strategy's memory and traffic"
    parser.add_argument("--nproc", type=_number_from_1, default=1, metavar="N", help=count)
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the learning rate as a picture")
    _overrides(parser)


def _launch(parser: ArgumentParser) -> None:
    counted = "on each machine (default: the number of its GPUs, or 1)"
    parser.add_argument("--nproc", type=_number_from_1, metavar="N", help=f"processes {counted}")
    parser.add_argument("--nodes", type=_number_from_1, default=1, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--master", metavar="HOST:PORT", help="where the machines meet: one of them, and a free port of it"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="e.g. -- sft --config FILE")


def _pipeline(parser: ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file with the stages, e.g. configs/pipeline_qwen05b.yaml")
    about = "train this stage alone; those that it starts from must be finished (default: all)"
    parser.add_argument("--stage", default="all", metavar="NAME|all", help=about)
    _overrides(parser, "a value of every stage's config (train.report_to=none), or of one (sft.train.max_steps=50)")
    parser.add_argument("--no-push-to-hub", action="store_true", help="keep all results on this machine")


def _pocket(parser: ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/sft_pocket.yaml", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of world, base model, SFT and prompts (default: 0)")
    parser.add_argument("--dpo", action="store_true", help="a shorter SFT, then DPO, as a pipeline with one table")
    made = "make base model, rows and prompts (with --dpo: also pairs), and stop"
    parser.add_argument("--lab-only", action="store_true", help=made)
    _overrides(parser)


_CHAT = "a conversation with a tuned model; an empty line or /quit ends it, /reset starts anew"
COMMANDS = {
    "init": Command("atlas.init", "a commented config for your own data", _init),
    "sft": Command("atlas.train.sft", "supervised fine-tuning: one config -> an adapter with proven labels", _training),
    "dpo": Command("atlas.train.dpo", "preference tuning (DPO): goes on from an SFT adapter", _training),
    "run": Command("atlas.pipeline", "a pipeline: phases in a row, scored and compared, with one table", _pipeline),
    "launch": Command("atlas.train.launcher", "a command on several processes, on one machine or several", _launch),
    "preflight": Command("atlas.train.preflight", "finds in seconds what would make a run fail later", _run),
    "sanity": Command(
        "atlas.train.sanity", "a few steps of a run, and what they prove, before hours go into it", _of_training
    ),
    "plan": Command("atlas.train.plan", "steps, tokens, learning rate, memory and time, before a run starts", _plan),
    "data": Command(
        "atlas.data.commands:data", "what a config trains on: rows used, cut, dropped, held out; lengths", _config
    ),
    "audit": Command("atlas.data.commands:audit", "what is trained, token by token; compare two audits", _audit),
    "eval": Command("atlas.eval.run", "score base, adapter or merged model with lm-eval; keep every reply", _eval),
    "compare": Command(
        "atlas.eval.compare", "is one run better than another on the same prompts, or is it luck?", _compare
    ),
    "winrate": Command(
        "atlas.eval.winrate", "which of two models answers better, by a judge? or is it luck?", _winrate
    ),
    "report": Command("atlas.report.page", "report.html: how a run went; several runs side by side", _report),
    "experiment": Command(
        "atlas.report.experiment", "a page in the log of experiments: hypothesis, run, scores, verdict", _experiment
    ),
    "generate": Command("atlas.eval.generate", "one reply of a tuned model", _generate),
    "chat": Command("atlas.eval.generate:chat", _CHAT, _generate),
    "push": Command("atlas.hub.push", "push a finished run to the Hub", _push),
    "pull": Command("atlas.hub.pull", "get an adapter from the Hub, at a pinned revision", _pull),
    "merge": Command("atlas.models.merge", "merge an adapter into its base model", _merge),
    "cache": Command("atlas.cache", "what is kept between two starts: rows, labels, quantised base models", _cache),
    "pocket": Command("atlas.pocket.lab", "the whole way on a machine with neither GPU nor Hub", _pocket),
}


def main() -> int:
    name, *arguments = sys.argv[1:] or [""]
    if name in ("", "-h", "--help"):
        print("usage: atlas COMMAND [arguments]\n")
        print("\n".join(f"  {name:<10} {command.what}" for name, command in COMMANDS.items()))
        print("\n`atlas COMMAND --help` shows the arguments of one.")
        return DONE if name else WRONG_INPUT
    if name == "--version":
        print(f"atlas {__version__}")
        return DONE
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        print(f"error: unknown command {name!r}; did you mean {near!r}?", file=sys.stderr)
        return WRONG_INPUT
    parse(name, arguments)  # --help and wrong arguments end here, before anything slow is imported
    return run_command(name, arguments)


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Run a command by its name. One that ends with another one, of whatever layer, calls it so."""
    module, _, function = COMMANDS[name].place.partition(":")
    status: int = getattr(import_module(module), function or "main")(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
