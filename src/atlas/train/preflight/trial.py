"""Checks of the phase's arguments and trainer: what a library refuses of `train:` is found before the model is loaded."""

import copy
import tempfile
import warnings
from typing import TYPE_CHECKING

from atlas.config import Config
from atlas.data.batches import PACK
from atlas.train.arguments import accepted, build_arguments, held_out, phase_arguments
from atlas.train.batching import PADDING_FREE, Batching, open_ways
from atlas.train.checkpoints import Identity
from atlas.train.preflight.checklist import Found, Ready
from atlas.train.strategy import refuse_another

if TYPE_CHECKING:
    from transformers import TrainingArguments


USUAL_RATE = 5e-5
"""With full fine-tuning: transformers' default. TRL's own example (trl/scripts/sft.py) trains Qwen2-0.5B at 2e-5, and at 2e-4 with
LoRA."""


def rate(ready: Ready) -> Found:
    """Is the learning rate one for LoRA, with full fine-tuning?"""
    found = ready.arguments.learning_rate
    if found <= USUAL_RATE:
        return f"{found:g}, within what full fine-tuning usually takes"
    return "warn", (
        f"{found:g} is more than full fine-tuning usually takes (up to {USUAL_RATE:g}; TRL's example for Qwen2-0.5B: 2e-5, and "
        "2e-4 for LoRA). Too high a rate makes a model forget what it knew: set train.learning_rate. Models of a few million "
        "parameters take more"
    )


def training(ready: Ready) -> str:
    """Are the arguments accepted, and how much will be trained?"""
    arguments = ready.arguments = phase_arguments(ready.phase, ready.loaded, ready.plan, ready.strategy)
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    max_length = getattr(arguments, "max_length", None)
    schema = ready.loaded.config.train_schema
    size = f"{rows} {'packs' if getattr(arguments, 'packing', False) else schema.rows}"
    size += f", at most {max_length:,} tokens each{' side' * (schema.sequences > 1)}" if max_length else ""
    if arguments.max_steps > 0:
        tokens = rows * schema.sequences * arguments.max_steps * (max_length or 0)
        steps = f"{arguments.max_steps:,} steps of {size}" + (f", {tokens:,} tokens at most" if tokens else "")
    else:
        epochs = f"{arguments.num_train_epochs:g} epoch{'s' * (arguments.num_train_epochs != 1)}"
        steps = f"{epochs} in steps of {size}; how many is known with the data"
    evaluated = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
    if evaluated == "no":
        return steps
    return f"{steps}; held-out loss every {f'{arguments.eval_steps:g} steps' if evaluated == 'steps' else evaluated}"


def trainer(ready: Ready) -> str:
    """Does the trainer start? Its loader, optimizer and schedule are tried on the model without weights and two rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run's own trainer gives the same warnings
        arguments = accepted(lambda config: _try_trainer(ready, config), ready.loaded.config)
    optimizer, schedule = arguments.optim, arguments.lr_scheduler_type
    return f"{getattr(optimizer, 'value', optimizer)}, {getattr(schedule, 'value', schedule)} schedule"


def _try_trainer(ready: Ready, config: Config) -> "TrainingArguments":
    import torch
    from datasets import Dataset
    from torch.utils.checkpoint import checkpoint

    phase = ready.phase
    # There is nothing to move: the model has no weights.
    trial = type("Trial", (phase.trainer(),), {"_move_model_to_device": lambda self, model, device: None})
    arguments = build_arguments(phase, config, ready.plan, ready.strategy)
    if open_ways(config)[0] == [PACK]:
        Batching(PACK, "", follows=PADDING_FREE).apply(arguments)
    rows, model = Dataset.from_list(phase.sample(ready.tokenizer)), copy.deepcopy(ready.empty)
    if continues := config.train_schema.continues:  # an adapter that is there would be copied, which needs numbers
        model = model.unload()
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir, arguments.report_to = folder, []
        trainer = trial(
            model=model,
            peft_config=ready.adapter if continues else None,
            args=arguments,
            train_dataset=phase.arrange(rows, arguments),
            eval_dataset=rows if held_out(config) else None,
            processing_class=ready.tokenizer,
            identity=Identity("", {}, None, "", None, 1),
        )
        refuse_another(ready.strategy, trainer.accelerator)
        loader = trainer.get_train_dataloader()
        if arguments.dataloader_num_workers == 0:
            next(iter(loader), None)
        if arguments.activation_checkpointing:
            checkpoint(torch.abs, torch.zeros(1), **(arguments.activation_checkpointing_kwargs or {}))
        # The optimizer looks at names and devices: one number stands for each matrix of the adapter.
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
            for step in (arguments.get_warmup_steps(steps) + 1, steps - 1):  # some values count only after the warm-up
                rate(step)
    return arguments
