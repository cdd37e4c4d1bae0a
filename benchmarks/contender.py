"""One contender's training run in a process of its own, measured from the start of the process: see speed.py.

    PYTHON benchmarks/contender.py '{"contender": "trl", "model": ..., "rows": ..., ...}'

Contenders: `trl` (a script as TRL's documentation writes it), `atlas` (the command `python -m atlas.train.PHASE`), `factory`
(LLaMA-Factory, in its own environment) and `unsloth`. Only the standard library is imported at the top, so that a contender's own
order of imports counts. What it measured goes into the file `out`.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Meter:
    """Time since the start of the process, memory, and for each step: seconds, CPU-seconds, tokens, loss."""

    def __init__(self, began: float) -> None:
        self.began = began
        """`time.time()` when the process was started."""
        self.parts: dict[str, float] = {}
        self.at_load: dict[str, float] = {}
        self.steps: dict[str, list[float]] = {
            name: [] for name in ("wall", "cpu", "tokens", "supervised", "positions", "loss", "resident")
        }
        self.inside = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0, "clipping": 0.0}
        """Seconds, from the second step on."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the start-up."""
        began = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began

    def around(self, owner: Any, function: str, part: str) -> None:
        """Let `owner.function` count as a part of the start-up."""
        original = getattr(owner, function)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                found = original(*args, **kwargs)
            if part == "model":
                self.loaded()
            return found

        setattr(owner, function, timed)

    def loaded(self) -> None:
        """The model is in memory."""
        self.at_load = resident_gib()

    def attach(self, trainer: Any) -> Any:
        """Measure what `trainer` does from now on."""
        import torch
        from transformers import TrainerCallback

        meter, steps = self, self.steps
        started = time.perf_counter()
        pad = trainer.processing_class.pad_token_id
        of_step: dict[str, Any] = {}
        training_step = trainer.training_step

        def measured(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            ids = inputs["input_ids"]
            scored = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"][:, 1:] != -100
            counts = {
                "tokens": (ids != pad).sum(),  # no contender's rows hold the pad token
                "supervised": scored.sum(),
                "positions": torch.tensor(ids.numel()),
            }
            if not getattr(trainer, "computes_padding", True):
                counts["positions"] = counts["tokens"]
            counts["loss"] = training_step(model, inputs, *args, **kwargs).detach()
            for name, value in counts.items():
                of_step[name] = of_step.get(name, 0) + value
            return counts["loss"]

        trainer.training_step = measured

        def inside(owner: Any, function: str, name: str) -> None:
            original = getattr(owner, function)

            @functools.wraps(original)
            def timed(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                try:
                    return original(*args, **kwargs)
                finally:
                    meter.inside[name] += time.perf_counter() - began

            setattr(owner, function, timed)

        inside(trainer.accelerator, "backward", "backward")
        inside(trainer.accelerator, "clip_grad_norm_", "clipping")
        # The outermost model's forward, with the head and the loss where they are parts of it.
        times: list[float] = []
        trainer.model.register_forward_pre_hook(lambda *_: times.append(time.perf_counter()))

        def forward_done(*_: Any) -> None:
            meter.inside["forward"] += time.perf_counter() - times.pop()

        trainer.model.register_forward_hook(forward_done)

        class Steps(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
                inside(optimizer, "step", "optimizer")

            def on_step_end(self, *_: Any, **__: Any) -> None:
                for name in ("tokens", "supervised", "positions", "loss"):
                    steps[name].append(float(of_step.pop(name)))  # waits for a GPU
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                steps["wall"].append(time.time() - meter.began)
                steps["cpu"].append(time.process_time())
                steps["resident"].append(resident_gib()["resident"])
                if len(steps["wall"]) == 1:
                    meter.parts["first step"] = time.perf_counter() - started
                    meter.inside = dict.fromkeys(meter.inside, 0.0)

        trainer.add_callback(Steps())
        return trainer

    def report(self) -> dict[str, Any]:
        import torch
        import transformers

        wall = self.steps["wall"]
        report = {
            "steps": self.steps,
            "first_step": {"wall": wall[0], "cpu": self.steps["cpu"][0]},
            "parts": self.parts | {"imports and the rest": wall[0] - sum(self.parts.values())},
            "inside": self.inside,
            "peak_gib": resident_gib()["peak"],
            "at_load_gib": self.at_load,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if torch.cuda.is_available():
            report["gpu"] = torch.cuda.get_device_name()
            report["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return report


def resident_gib() -> dict[str, float]:
    """Resident memory of this process now and at its peak, GiB (`ru_maxrss` would begin with the parent's)."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
        return {"peak": peak, "resident": peak}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 2**20 for name, key in (("peak", "VmHWM"), ("resident", "VmRSS"))}


# The recipe, the same for all: see `Job` in speed.py for what `job` holds.


def _dtype(job: dict[str, Any]) -> Any:
    import torch

    if "bf16" in job["options"]:
        return torch.bfloat16
    gpu = torch.cuda.is_available()
    half = gpu and torch.cuda.get_device_capability() >= (8, 0)
    return torch.bfloat16 if half else torch.float16 if gpu else torch.float32


def _arguments(job: dict[str, Any]) -> Any:
    """TRL's arguments: the recipe's numbers, and what has to be said of the machine."""
    import torch
    from trl import DPOConfig, SFTConfig

    options, dtype = job["options"], _dtype(job)
    # Unsloth masks the prompts by itself, and sets checkpointing with its adapter.
    own = {"dataset_text_field": "text"} if job["contender"] == "unsloth" else {"assistant_only_loss": True}
    return (DPOConfig if job["phase"] == "dpo" else SFTConfig)(
        output_dir=job["folder"],
        max_length=job["max_length"],
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=job["accumulation"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=job["steps"],
        seed=job["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        **(own if job["phase"] == "sft" else {}),
        **({"gradient_checkpointing": False} if "nockpt" in options else {}),
        **({"packing": True} if "pack" in options else {}),
        **({"use_liger_kernel": True} if "liger" in options else {}),
    )


def trl(job: dict[str, Any], meter: Meter) -> None:
    """Stock TRL. Its defaults, but for: float32 on a CPU, as the others have it (its own is bf16), the recipe's numbers, and no log
    to wandb. Options: `nockpt` (gradient checkpointing is its default), `fp32` (the adapter), `bf16`, `pack`, `16bit`, `liger`. For
    pairs `model`: the reference is a second model in 4 bits, instead of TRL's frozen copy of the adapter."""
    from datasets import load_dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
    from trl import DPOTrainer, SFTTrainer

    options, dtype = job["options"], _dtype(job)
    with meter.part("model"):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        load = functools.partial(
            AutoModelForCausalLM.from_pretrained,
            job["model"],
            quantization_config=None if "16bit" in options else quantization,
            dtype=dtype,
            attn_implementation=job["attention"],
        )
        model, more = load(), {}
        if job["adapter"]:
            model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
            # Its adapter merged into it would take as much memory and time.
            more = {"ref_model": load()} if "model" in options else {}
        else:
            more = {"peft_config": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")}
    meter.loaded()
    arguments = _arguments(job)
    with meter.part("data"):
        set_seed(job["seed"])  # the adapter is initialised in the constructor
        trainer = (DPOTrainer if job["phase"] == "dpo" else SFTTrainer)(
            model=model,
            args=arguments,
            train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
            processing_class=AutoTokenizer.from_pretrained(job["tokenizer"]),
            **more,
        )
    if "fp32" in options:  # TRL trains the adapter of a 4-bit model in bf16, atlas in float32
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    meter.attach(trainer).train()


def atlas(job: dict[str, Any], meter: Meter) -> None:
    """The command of atlas. Options: `pad`, `group`, `pack` (train.batching), `ckpt`, `nockpt`, `16bit`, `liger`, `own` (its own
    LM head on a GPU too)."""
    from importlib import import_module

    from atlas.train.run import Run

    options, main = job["options"], import_module(f"atlas.train.{job['phase']}").main
    meter.around(Run, "prepare", "data")
    meter.around(Run, "load_base_model", "model")
    meter.around(Run, "trainer", "trainer")
    fit = Run.fit

    def measured_fit(run: Run, trainer: Any) -> None:
        if "own" in options:  # where TRL's Triton head would run, atlas' own takes its place
            import_module(f"atlas.train.{job['phase']}_trainer").head_is_fused = lambda device: False
        fit(run, meter.attach(trainer))

    Run.fit = measured_fit  # type: ignore[method-assign]
    given = {
        "model.name": job["model"],
        "model.tokenizer_name": job["tokenizer"],
        "model.attn_implementation": job["attention"],
        **(
            {"model.adapter": job["adapter"]} if job["adapter"] else {"lora.lora_dropout": 0.0}
        ),  # PEFT's, LLaMA-Factory's
        "data.train": job["rows"],
        "train.max_length": job["max_length"],
        "train.per_device_train_batch_size": job["batch"],
        "train.gradient_accumulation_steps": job["accumulation"],
        "train.learning_rate": job["learning_rate"],
        "train.lr_scheduler_type": "constant",
        "train.warmup_steps": 0,
        "train.seed": job["seed"],
        "train.save_strategy": "no",
        "train.report_to": "none",
        "output.dir": job["folder"],
        "output.results_dir": f"{job['folder']}/results",
        **{f"train.batching={way}": None for way in ("auto", "pad", "group", "pack") if way in options},
        **({"train.gradient_checkpointing": "nockpt" not in options} if {"ckpt", "nockpt"} & {*options} else {}),
        **({"quantization.load_in_4bit": False} if "16bit" in options else {}),
        **({"train.use_liger_kernel": True} if "liger" in options else {}),
    }
    if job["overrides"] is not None:
        given = {**job["overrides"], "output.dir": job["folder"], "output.results_dir": f"{job['folder']}/results"}
    overrides = [key if value is None else f"{key}={json.dumps(value)}" for key, value in given.items()]
    command = ["--config", job["config"], "--max-steps", str(job["steps"]), "--resume", "never"]
    if status := main([*command, "--no-push-to-hub", *overrides]):
        sys.exit(status)


def factory(job: dict[str, Any], meter: Meter) -> None:
    """LLaMA-Factory. Options: `pack`, `neat` (packing without attention across rows), `nockpt`. A pack takes the place of several
    rows, so fewer packs make a step: `accumulation` comes from speed.py."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # it asks for older versions than the torch of this benchmark
    from llamafactory.train import tuner
    from llamafactory.train.sft import workflow
    from transformers import Trainer

    options, folder = job["options"], Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {
                "rows": {
                    "file_name": job["rows"],
                    "formatting": "sharegpt",
                    "columns": {"messages": "messages"},
                    "tags": {
                        "role_tag": "role",
                        "content_tag": "content",
                        "user_tag": "user",
                        "assistant_tag": "assistant",
                        "system_tag": "system",
                    },
                }
            }
        )
    )
    meter.around(workflow, "get_dataset", "data")
    meter.around(workflow, "load_model", "model")
    train = Trainer.train
    Trainer.train = lambda trainer, *args, **kwargs: train(meter.attach(trainer), *args, **kwargs)
    tuner.run_exp(
        {
            "model_name_or_path": job["model"],
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
            "lora_target": ",".join(TARGETS),
            "quantization_bit": 4,
            "quantization_method": "bnb",
            "dataset_dir": str(folder),
            "dataset": "rows",
            "template": "qwen",
            "cutoff_len": job["max_length"],
            "packing": bool({"pack", "neat"} & {*options}),
            "neat_packing": "neat" in options,
            "disable_gradient_checkpointing": "nockpt" in options,
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": job["batch"],
            "gradient_accumulation_steps": job["accumulation"],
            "learning_rate": job["learning_rate"],
            "lr_scheduler_type": "constant",
            "max_steps": job["steps"],
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "seed": job["seed"],
            "trust_remote_code": False,
        }
    )


def unsloth(job: dict[str, Any], meter: Meter) -> None:
    """Unsloth, as its notebooks write it. It needs a GPU; this function has not run yet. Options: `nockpt`, `16bit`."""
    from unsloth import FastLanguageModel  # isort: skip  (it has to be imported before TRL)
    from datasets import load_dataset
    from trl import SFTTrainer
    from unsloth.chat_templates import train_on_responses_only

    options = job["options"]
    with meter.part("model"):
        model, tokenizer = FastLanguageModel.from_pretrained(
            job["model"], max_seq_length=job["max_length"], load_in_4bit="16bit" not in options
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0,
            target_modules=TARGETS,
            use_gradient_checkpointing=False if "nockpt" in options else "unsloth",
        )
    meter.loaded()
    with meter.part("data"):
        rows = load_dataset("json", data_files=job["rows"], split="train")
        rows = rows.map(lambda row: {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)})
        trainer = SFTTrainer(model=model, args=_arguments(job), train_dataset=rows, processing_class=tokenizer)
        trainer = train_on_responses_only(
            trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
        )
    meter.attach(trainer).train()


OPTIONS = {
    "trl": {"nockpt", "fp32", "bf16", "pack", "16bit", "liger", "fa2", "model"},
    "atlas": {"pad", "group", "pack", "auto", "ckpt", "nockpt", "16bit", "liger", "own", "fa2"},
    "factory": {"pack", "neat", "nockpt"},
    "unsloth": {"nockpt", "16bit"},
}
CONTENDERS: dict[str, Callable[[dict[str, Any], Meter], None]] = {
    "trl": trl,
    "atlas": atlas,
    "factory": factory,
    "unsloth": unsloth,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    meter = Meter(job["began"])
    if unknown := {*job["options"]} - OPTIONS[job["contender"]]:
        sys.exit(f"{job['contender']} has no option {', '.join(sorted(unknown))}")
    CONTENDERS[job["contender"]](job, meter)
    Path(job["out"]).write_text(json.dumps(meter.report()))


if __name__ == "__main__":
    main()
