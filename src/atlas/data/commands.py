"""`atlas data` and `atlas audit`: what a config would train on, or what is different between two audits. No model is loaded."""

from argparse import Namespace
from pathlib import Path

from atlas.auditing.gate import gate
from atlas.auditing.report import diff, write_audit
from atlas.cli import command
from atlas.config import Config, LoadedConfig, load_config
from atlas.console import say
from atlas.data.labeled import Labeled
from atlas.data.prepare import prepare
from atlas.data.report import write_report
from atlas.errors import DONE, FAILED, UserError
from atlas.files import RESULTS_DIR, can_write
from atlas.models.tokenizer import load_tokenizer
from atlas.terminal import quiet_libraries


@command("data")
def data(arguments: Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides).config
    labeled = _labeled(config)
    if config.data.streaming:
        if any(source.rows is None and not source.is_local for source in config.data.train):
            raise UserError("data.streaming: say with `rows` how much of each source `atlas data` is to read")
        for _ in labeled.dataset:  # the ledgers count what passes by
            pass
    say(labeled.table())
    print(f"report: {write_report(labeled, Path(config.output.results_dir))}")
    gate(config, labeled)
    return DONE


@command("audit")
def audit(arguments: Namespace) -> int:
    if arguments.diff:
        same, message = diff(*arguments.diff)
        say(message)
        return DONE if same else FAILED
    dump_audit(load_config(arguments.config, arguments.overrides))
    return DONE


def dump_audit(loaded: LoadedConfig) -> Path:
    """Write the template audit of the data as configured, and return its path."""
    config = loaded.config
    labeled = _labeled(config)
    say(labeled.table())
    path = write_audit(labeled, Path(config.output.results_dir))
    gate(config, labeled)
    return path


def _labeled(config: Config) -> Labeled:
    quiet_libraries()
    can_write(Path(config.output.results_dir), *RESULTS_DIR)
    return prepare(config, load_tokenizer(config))
