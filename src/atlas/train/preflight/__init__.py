"""`atlas preflight`: everything that would end a run badly, found in seconds, before any data or model is loaded.

Each check is one line: ok, fail (with what to do), warn (the run can start, but look at this), skip (not asked for, or nothing can
be asked). All failures are reported together. A run does the same first.
"""

import contextlib
from argparse import Namespace

from atlas.cli import command
from atlas.config import LoadedConfig, is_path, load_config
from atlas.console import say
from atlas.data.sources import reach
from atlas.errors import DONE
from atlas.terminal import quiet_libraries
from atlas.train.phase import phase_of
from atlas.train.preflight import folders, machine, model, online, trial
from atlas.train.preflight.checklist import Ready
from atlas.train.timing import Parts

__all__ = ["Ready", "main", "preflight"]


@command("preflight")
def main(arguments: Namespace) -> int:
    loaded = load_config(arguments.config, arguments.overrides)
    quiet_libraries()
    ready = preflight(loaded, arguments.resume)
    say(ready.table())
    ready.refuse_failures()
    print("this run can start")
    return DONE


def preflight(loaded: LoadedConfig, resume: str = "auto", start: Parts | None = None) -> Ready:
    """Do all checks. Nothing is loaded, written or created, except `output.hub_repo` if it does not exist yet. `start` is told
    when the libraries are imported."""
    phase = phase_of(loaded.config)
    ready = Ready(loaded, phase, resume)
    if loaded.config.train_schema.continues:
        ready.check("adapter", model.parent, ready)
    else:
        ready.parent = None
    config = ready.loaded.config
    ready.check("config", lambda: f"hash {ready.loaded.config_hash}", needs=["parent"])
    ready.check("launch", machine.launch)
    ready.check("device", machine.device, ready)
    ready.check("libraries", machine.libraries, ready)
    if hasattr(ready, "libraries"):
        with contextlib.suppress(Exception):  # the checks below say what is wrong
            phase.trainer()  # imports all that trains
    if start is not None:
        start.end("imports")
    for name, look in phase.checks.items():
        ready.check(name, look, config)
    ready.check("output folder", folders.output, ready)
    ready.check("results", folders.results, ready)
    ready.check("Hub", online.hub, ready)
    ready.check("tracker", online.tracker, ready, needs=["libraries"])

    from atlas.data.prepare import labeler_class

    sources, formats = [*config.data.train, *config.data.eval], labeler_class(config).formats
    tokenizer = config.model.tokenizer_name or config.model.name
    on_hub = {name for name in (tokenizer, config.model.name) if not is_path(name)}
    on_hub |= {source.name for source in sources if not source.is_local}
    ready.check("network", online.network, ready, bool(on_hub))
    network = {name: ["network"] for name in on_hub}
    for source in sources:
        ready.check("data", reach, source, formats, needs=network.get(source.name, []))
    ready.check("tokenizer", model.tokenizer, ready, needs=["parent", "libraries", *network.get(tokenizer, [])])
    ready.check("base model", model.base, ready, needs=["parent", "libraries", *network.get(config.model.name, [])])
    ready.check("strategy", machine.strategy, ready, needs=["plan"])
    ready.check("memory", machine.memory, ready, needs=["strategy", "shape"])
    ready.check("training", trial.training, ready, needs=["strategy", "libraries"])
    if config.lora is None:
        ready.check("learning rate", trial.rate, ready, needs=["arguments"])
    ready.check("trainer", trial.trainer, ready, needs=["arguments", "tokenizer", "empty"])
    ready.check("cache", folders.cache, ready, needs=["base"])
    ready.check("disk", folders.disk, ready, needs=["arguments", "tokenizer", "shape"])
    return ready
