"""`atlas preflight`: everything that would end a run badly, found in seconds, before any data or model is loaded.

Each check is one line: ok, fail (with what to do), warn (the run will do, but see), skip (not asked for, or no network wanted).
All failures are reported together. `atlas sft` does the same first.
"""

import contextlib
import copy
import io
import re
import shutil
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas.cli import command
from atlas.compat import check_libraries
from atlas.config import Config, LoadedConfig, is_path, load_config
from atlas.console import quiet_libraries, say
from atlas.data.sources import data_files, reach
from atlas.device import DevicePlan, Machine, choose_device
from atlas.errors import DONE, RunError, UserError, first_line
from atlas.files import RESULTS_DIR, can_write, existing
from atlas.launch import is_main_process
from atlas.redact import redact
from atlas.train.arguments import accepted, build_arguments, held_out, phase_arguments
from atlas.train.phase import Phase, phase_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from atlas.models.load import BaseFiles

GIB = 2**30
ADAM_BYTES = 4 + 4 + 8  # fp32 adapter, its gradient, AdamW's two moments
CHECKPOINT_BYTES = 4 + 8  # the same without the gradient
PREPARED = 3  # times the source: a copy of its text, and 8 bytes for each token of about 4 characters


class Line(NamedTuple):
    """One check: "ok", "fail", "warn" or "skip", its name, what was found; for a failure with the remedy."""

    status: str
    name: str
    text: str


class Sizes(NamedTuple):
    """Numbers of parameters: of the layers that 4 bits apply to, of all others, of the adapter."""

    linear: int
    other: int
    adapter: int


@dataclass
class Ready:
    """What the checks have found out; a run goes on with it. A field whose check has failed is not set."""

    lines: list[Line] = field(default_factory=list)
    failures: list[UserError | RunError] = field(default_factory=list)
    bitsandbytes: bool = field(init=False)
    """It is not installed, or can be imported, and so can what imports it."""
    libraries: bool = field(init=False)
    online: bool = field(init=False)
    plan: DevicePlan = field(init=False)
    arguments: "TrainingArguments" = field(init=False)
    tokenizer: "PreTrainedTokenizerBase" = field(init=False)
    adapter: "LoraConfig" = field(init=False)
    empty: "PeftModel" = field(init=False)
    """Base model and adapter without weights."""
    sizes: Sizes = field(init=False)
    base: "BaseFiles" = field(init=False)

    def check(self, name: str, look: Callable[[], Line | str], *needed: str) -> None:
        """Add the line of one check, unless one that it needs has failed."""
        if not all(hasattr(self, need) for need in needed):
            return
        try:
            found: Line | str = look()
        except (UserError, RunError) as error:
            self.failures.append(error)
            found = Line("fail", name, str(error))
        self.lines.append(found if isinstance(found, Line) else Line("ok", name, found))

    def table(self) -> str:
        """The checklist, a line each."""
        width = max(len(line.name) for line in self.lines)
        indent = "\n" + " " * (width + 14)
        return "\n".join(
            f"  {line.status:<4}  {line.name:<{width}}  {indent.join(redact(line.text).split(chr(10)))}"
            for line in self.lines
        )

    def refuse_failures(self) -> None:
        """Raises one error that tells all failures: `RunError` where each of them may pass by itself, else `UserError`."""
        if self.failures:
            many = len(self.failures) > 1
            begin = f"{len(self.failures)} things would end this run badly:\n       - " if many else ""
            kind = RunError if all(isinstance(error, RunError) for error in self.failures) else UserError
            raise kind(begin + "\n       - ".join(map(str, self.failures)))


@command("preflight")
def main(arguments: Namespace) -> int:
    loaded = load_config(arguments.config, arguments.overrides)
    quiet_libraries()
    ready = preflight(loaded, arguments.resume)
    say(ready.table())
    ready.refuse_failures()
    print("nothing stands in the way of this run")
    return DONE


def preflight(loaded: LoadedConfig, resume: str = "auto") -> Ready:
    """Look at everything. Nothing is loaded, written or created, but for `output.hub_repo` where it does not exist yet."""
    config, ready = loaded.config, Ready()
    phase = phase_of(config)
    ready.check("config", lambda: f"hash {loaded.config_hash}")
    ready.check("device", lambda: _device(ready, loaded))
    ready.check("quantisation", lambda: _quantisation(ready, loaded))
    ready.check("libraries", lambda: _libraries(ready), "bitsandbytes")
    ready.check("training", lambda: _training(ready, phase, loaded), "plan", "libraries")
    for name, look in phase.checks.items():
        ready.check(name, partial(_of_phase, name, look, config))
    ready.check("output folder", lambda: _output_folder(loaded, resume))
    ready.check("results", lambda: _results_folder(loaded))
    ready.check("Hub", lambda: _hub(loaded))
    ready.check("tracker", lambda: _tracker(loaded), "libraries")
    sources = (*config.data.train, *config.data.eval)
    tokenizer = config.model.tokenizer_name or config.model.name
    of_hub = [name for name in (tokenizer, config.model.name) if not is_path(name)]
    of_hub += [source.name for source in sources if not source.is_local]
    ready.check("network", lambda: _network(ready, of_hub))

    def online(name: str) -> list[str]:
        return ["online"] if name in of_hub else []

    for source in sources:
        ready.check("data", partial(reach, source), *online(source.name))
    ready.check("tokenizer", lambda: _tokenizer(ready, loaded), "libraries", *online(tokenizer))
    ready.check("base model", lambda: _base_model(ready, loaded, resume), "libraries", *online(config.model.name))
    ready.check("trainer", lambda: _trainer(ready, phase, loaded), "arguments", "tokenizer", "empty")
    ready.check("memory", lambda: _memory(ready, loaded), "plan", "sizes")
    ready.check("cache", lambda: _cache(ready, loaded), "base")
    ready.check("disk", lambda: _disk(ready, loaded), "arguments", "tokenizer", "sizes")
    return ready


def _device(ready: Ready, loaded: LoadedConfig) -> str:
    ready.plan = choose_device(loaded.config, Machine.from_torch())
    return ready.plan.hardware


def _quantisation(ready: Ready, loaded: LoadedConfig) -> Line | str:
    asked, version = loaded.config.quantization, ""
    if find_spec("bitsandbytes") is not None:  # that it is missing where it is needed has been said with the device
        try:
            import bitsandbytes
        except (
            Exception
        ) as error:  # a wheel for another CUDA raises RuntimeError, OSError or its own; so does all that imports it
            raise UserError(
                f"bitsandbytes is installed, but cannot be imported ({first_line(error)}), and the other libraries not without it: "
                "install one that fits this torch (`pip install -U bitsandbytes`), or remove it and set "
                "quantization.load_in_4bit=false"
            ) from None
        version = bitsandbytes.__version__
    ready.bitsandbytes = True
    if not asked.load_in_4bit:
        return Line("skip", "quantisation", "load_in_4bit is off")
    return f"{asked.bnb_4bit_quant_type}, bitsandbytes {version}"


def _libraries(ready: Ready) -> str:
    found = check_libraries()
    ready.libraries = True
    return found


def _training(ready: Ready, phase: Phase, loaded: LoadedConfig) -> str:
    arguments = ready.arguments = phase_arguments(phase, loaded, ready.plan)
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    max_length = getattr(arguments, "max_length", None)
    size = f"{rows} {'packs' if getattr(arguments, 'packing', False) else 'rows'}"
    size += f", at most {max_length:,} tokens each" if max_length else ""
    if arguments.max_steps > 0:
        tokens = rows * arguments.max_steps * (max_length or 0)
        steps = f"{arguments.max_steps:,} steps of {size}" + (f", {tokens:,} tokens at most" if tokens else "")
    else:
        epochs = f"{arguments.num_train_epochs:g} epoch{'s' * (arguments.num_train_epochs != 1)}"
        steps = f"{epochs} in steps of {size}; how many is known with the data"
    evaluated = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
    if evaluated == "no":
        return steps
    return f"{steps}; held-out loss every {f'{arguments.eval_steps:g} steps' if evaluated == 'steps' else evaluated}"


def _of_phase(name: str, look: Callable[[Config], tuple[str, str]], config: Config) -> Line:
    status, text = look(config)
    return Line(status, name, text)


def _output_folder(loaded: LoadedConfig, resume: str) -> Line | str:
    from atlas.lock import refuse_if_held
    from atlas.train.checkpoints import Identity, checkpoints, refuse_other_runs
    from atlas.train.folder import refuse_foreign

    folder = Path(loaded.config.output.dir)
    can_write(folder, "output.dir", "choose another output.dir")
    if is_main_process():  # which holds it for all
        refuse_if_held(folder)
    refuse_foreign(folder, resume)
    if resume != "never":
        refuse_other_runs(folder, Identity.of(loaded, None, "", None))
    elif checkpoints(folder) or (folder / "manifest.json").exists():
        return Line("warn", "output folder", f"{folder} holds a run, which --resume never trains over")
    return str(folder)


def _results_folder(loaded: LoadedConfig) -> Line | str:
    try:
        can_write(Path(loaded.config.output.results_dir), *RESULTS_DIR)
    except UserError as error:  # only what is done before and after the run writes there
        return Line("warn", "results", f"{error}, before `atlas audit` or `atlas eval`")
    return loaded.config.output.results_dir


def _hub(loaded: LoadedConfig) -> Line | str:
    from huggingface_hub import constants

    from atlas.hub.push import check_access

    output = loaded.config.output
    if output.hub_repo is None:
        return Line("skip", "Hub", "nothing is pushed (output.hub_repo is not set, or --no-push-to-hub)")
    if not is_main_process():
        return Line("skip", "Hub", "the first process asks")
    if constants.HF_HUB_OFFLINE:
        return Line("skip", "Hub", f"HF_HUB_OFFLINE is set: the push to {output.hub_repo} will be left to do")
    check_access(output.hub_repo, private=output.hub_private)
    return f"{output.hub_repo} can be written to"


def _tracker(loaded: LoadedConfig) -> Line | str:
    from transformers.integrations import get_available_reporting_integrations

    from atlas.train.arguments import available_trackers, wandb_is_offline

    names, wandb_off = available_trackers(loaded.config.train_value("report_to"))
    known = {"none", "all", *get_available_reporting_integrations()}
    if missing := [name for name in names if name not in known]:
        raise UserError(
            f"train.report_to: {missing[0]!r} is not installed, or no tracker that transformers knows: install its package, or set "
            "train.report_to=none"
        )
    if wandb_off:
        return Line("warn", "tracker", f"wandb off: {wandb_off}")
    if names == ["none"]:
        return Line("skip", "tracker", "train.report_to is none")
    if "wandb" in names and not wandb_is_offline() and is_main_process():
        import wandb

        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                wandb.login(verify=True)
        except (
            Exception
        ) as error:  # AuthenticationError for a wrong key and a dead network alike, UsageError for a malformed key
            refused = not re.search(r"respond|connect|timed|50\d", str(error))
            raise (UserError if refused else RunError)(
                f"train.report_to: wandb cannot be used ({first_line(error)}): log in again (`wandb login`), or set "
                "WANDB_MODE=offline, or train.report_to=none"
            ) from None
    return ", ".join(names)


def _network(ready: Ready, of_hub: list[str]) -> Line | str:
    from huggingface_hub import constants

    from atlas.hub_client import check_network

    if not of_hub or constants.HF_HUB_OFFLINE:
        ready.online = True
        why = "HF_HUB_OFFLINE is set: what is cached is used" if of_hub else "everything is on this machine"
        return Line("skip", "network", why)
    check_network()
    ready.online = True
    return constants.ENDPOINT


def _tokenizer(ready: Ready, loaded: LoadedConfig) -> str:
    from atlas.models.tokenizer import load_tokenizer

    tokenizer = ready.tokenizer = load_tokenizer(loaded.config)
    return f"{tokenizer.name_or_path}: {len(tokenizer):,} tokens, stops with {tokenizer.eos_token}"


def _base_model(ready: Ready, loaded: LoadedConfig, resume: str) -> str:
    import torch

    from atlas.models.adapters import lora_config
    from atlas.models.load import check_weights, empty_model
    from atlas.train.checkpoints import Identity, refuse_other_runs

    config = loaded.config
    model = empty_model(config, getattr(ready, "tokenizer", None))
    ready.base = check_weights(config)
    if resume != "never" and not any(line.status == "fail" for line in ready.lines if line.name == "output folder"):
        refuse_other_runs(Path(config.output.dir), Identity.of(loaded, None, "", ready.base.content))
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    linear = sum(layer.weight.numel() for layer in layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    ready.adapter = lora_config(config.lora)
    ready.empty = _with_adapter(model, ready.adapter)
    adapter = sum(parameter.numel() for parameter in ready.empty.parameters() if parameter.requires_grad)
    ready.sizes = Sizes(linear, total - linear, adapter)
    return f"{config.model.name}: {total / 1e6:,.1f} M parameters, {adapter / 1e6:,.2f} M in the adapter"


def _with_adapter(model: Any, adapter: "LoraConfig") -> "PeftModel":
    import torch
    from peft import get_peft_model

    try:
        with torch.device("meta"):
            return get_peft_model(model, adapter)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {first_line(error)}") from None


def _trainer(ready: Ready, phase: Phase, loaded: LoadedConfig) -> str:
    """The trainer, its loader, optimizer and schedule, on the model without weights and two rows: what a library refuses
    of `train:`, it refuses now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run's own trainer says them too
        arguments = accepted(lambda config: _try_trainer(ready, phase, config), loaded.config)
    optimizer, schedule = arguments.optim, arguments.lr_scheduler_type
    return f"{getattr(optimizer, 'value', optimizer)}, {getattr(schedule, 'value', schedule)} schedule"


def _try_trainer(ready: Ready, phase: Phase, config: Config) -> "TrainingArguments":
    import torch
    from datasets import Dataset
    from torch.utils.checkpoint import checkpoint

    from atlas.train.checkpoints import Identity

    # There is nothing to move: the model has no weights.
    trial = type("Trial", (phase.trainer(),), {"_move_model_to_device": lambda self, model, device: None})
    arguments = build_arguments(phase, config, ready.plan)
    rows = Dataset.from_list(phase.sample(ready.tokenizer))
    if arguments.use_liger_kernel:
        import_module("liger_kernel")  # when training starts the library needs it
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir, arguments.report_to = folder, []
        trainer = trial(
            model=copy.deepcopy(ready.empty),
            args=arguments,
            train_dataset=phase.arrange(rows, arguments),
            eval_dataset=rows if held_out(config) else None,
            processing_class=ready.tokenizer,
            identity=Identity("", {}, None, "", None, 1),
        )
        loader = trainer.get_train_dataloader()
        if arguments.dataloader_num_workers == 0:
            next(iter(loader), None)
        if arguments.activation_checkpointing:
            checkpoint(torch.abs, torch.zeros(1), **(arguments.activation_checkpointing_kwargs or {}))
        # The optimizer looks at names and devices; one number stands for each matrix of the adapter.
        for module in trainer.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    one = torch.nn.Parameter(torch.zeros(1, 1, device=arguments.device))
                    one.grad = torch.zeros_like(one)
                    module.register_parameter(name, one)
        steps = arguments.max_steps if arguments.max_steps > 0 else 100
        trainer.create_optimizer_and_scheduler(steps)
        for _ in range(2):
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        for rate in getattr(trainer.lr_scheduler, "lr_lambdas", ()):
            for step in (arguments.get_warmup_steps(steps) + 1, steps - 1):  # what counts only after the warm-up
                rate(step)
    return arguments


def _memory(ready: Ready, loaded: LoadedConfig) -> Line | str:
    needed = static_bytes(loaded, ready.plan, ready.sizes)
    said = f"{_size(needed)} for weights, adapter and optimizer, before activations"
    if ready.plan.device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        if needed > free:
            taken = (
                f", of which {_size(total - free)} are taken (nvidia-smi shows by whom)" if total - free > GIB else ""
            )
            raise UserError(
                f"memory: {said}, but the GPU has {_size(total)}{taken}: use quantization.load_in_4bit=true, a smaller base "
                "model or a smaller lora.r"
            )
        return f"{said}, of {_size(free)} free"
    ram = _free_ram()
    if ram is not None and needed > ram:
        raise UserError(f"memory: {said}, but only {_size(ram)} are free: use a smaller base model")
    return said if ram is None else f"{said}, of {_size(ram)} free"


def static_bytes(loaded: LoadedConfig, plan: DevicePlan, sizes: Sizes) -> int:
    """Bytes that weights, adapter, its gradient and optimizer take whatever the batch is; activations come on top.

    NF4: half a byte per weight and one constant per 64 of them, of 4 bytes, or, quantised again, of 1 byte and 4/256
    (https://arxiv.org/abs/2305.14314, section 3).
    """
    quantization, width = loaded.config.quantization, 4 if plan.dtype == "float32" else 2
    each = 0.5 + (1 + 4 / 256 if quantization.bnb_4bit_use_double_quant else 4) / 64
    linear = sizes.linear * (each if quantization.load_in_4bit else width)
    return int(linear + sizes.other * width + sizes.adapter * ADAM_BYTES)


def _free_ram() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cache(ready: Ready, loaded: LoadedConfig) -> Line | str:
    """Room for the base model, where it has to be downloaded, and for the prepared data."""
    import datasets
    from huggingface_hub import constants

    data = loaded.config.data
    models, rows = Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)
    for folder in (models, rows):
        can_write(folder, "cache", "set HF_HOME to a folder with room")
    free = shutil.disk_usage(existing(models)).free
    if ready.base.download > free:
        raise UserError(
            f"cache: the base model takes {_size(ready.base.download)}, {existing(models)} has {_size(free)} free: make "
            "room, or set HF_HOME to a folder with room"
        )
    files: set[Path] = set()
    for source in (*data.train, *data.eval):
        if source.is_local and not data.streaming:
            with contextlib.suppress(UserError):  # said in the source's own line
                files.update(data_files(Path(source.name).expanduser()))
    prepared = PREPARED * sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(existing(rows)).free
    said = f"about {_size(prepared)} for the prepared data in {rows}, {_size(free)} free"
    if prepared > free:
        return Line(
            "warn", "cache", f"{said}: unless they are there already, set HF_DATASETS_CACHE or data.streaming=true"
        )
    return (f"{_size(ready.base.download)} of base model to download; " if ready.base.download else "") + said


def _disk(ready: Ready, loaded: LoadedConfig) -> Line | str:
    """Room for the checkpoints that are kept, one that is being written, and the final adapter."""
    arguments, folder = ready.arguments, existing(Path(loaded.config.output.dir))
    tokenizer = 4 * len(ready.tokenizer) * 20  # tokenizer.json: vocabulary and merges, about 80 bytes a token
    one = ready.sizes.adapter * CHECKPOINT_BYTES + tokenizer
    kept = _checkpoints_kept(arguments)
    needed = one * ((kept or 1) + 1) + ready.sizes.adapter * 4 + tokenizer
    # A run that goes on has some of them already, and removes the oldest for each new one.
    own = sum(path.stat().st_size for path in folder.glob("checkpoint-*/*") if path.is_file())
    free = shutil.disk_usage(folder).free
    many = f"{kept} checkpoints" if kept is not None else "each checkpoint"
    said = f"{_size(needed)} for {many} of {_size(one)} and the adapter" if kept else f"{_size(one)}"
    if needed > free + own:
        raise UserError(
            f"output.dir: {folder} has {_size(free)} free, the run needs {said}: make room, choose another output.dir, or "
            "keep fewer checkpoints (train.save_total_limit)"
        )
    if kept is None:
        return Line("warn", "disk", f"{_size(one)} for every checkpoint, none is removed: set train.save_total_limit")
    return f"{said}, of {_size(free)} free"


def _checkpoints_kept(arguments: "TrainingArguments") -> int | None:
    """How many there will be at most, or None where nothing limits them."""
    if arguments.save_total_limit:
        return int(arguments.save_total_limit) + int(arguments.load_best_model_at_end)
    if arguments.max_steps > 0 and str(getattr(arguments.save_strategy, "value", "")) == "steps":
        every = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * arguments.max_steps
        return int(arguments.max_steps // max(every, 1)) + 1
    return None


def _size(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
