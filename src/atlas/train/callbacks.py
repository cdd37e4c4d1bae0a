"""What a run says while it trains: one line per logging step."""

import resource
import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LogLine(TrainerCallback):
    """Prints loss, learning rate, gradient norm, supervised and total tokens per second, memory and time left.

    `history` keeps (step, loss) of every logged step for the summary and the manifest, `eval_losses` those of held-out data.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, float]] = []
        self.eval_losses: list[tuple[int, float]] = []
        self._last = (time.perf_counter(), 0, 0)
        self._began = (time.perf_counter(), 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (time.perf_counter(), 0, 0)
        self._began = (time.perf_counter(), state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.eval_losses.append((state.global_step, logs["eval_loss"]))
            if state.is_world_process_zero:
                print(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}", flush=True)
        if "loss" not in logs:
            return
        self.history.append((state.global_step, logs["loss"]))
        if not state.is_world_process_zero:
            return
        now, total, supervised = (
            time.perf_counter(),
            int(logs.get("num_tokens", 0)),
            int(logs.get("supervised_tokens", 0)),
        )
        seconds = max(now - self._last[0], 1e-9)
        left = (
            (now - self._began[0]) / max(state.global_step - self._began[1], 1) * (state.max_steps - state.global_step)
        )
        width = len(str(state.max_steps))
        print(
            f"step {state.global_step:>{width}}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
            f"grad {logs.get('grad_norm', 0.0):.3f}  {(supervised - self._last[2]) / seconds:,.0f} supervised tok/s  "
            f"{(total - self._last[1]) / seconds:,.0f} tok/s  {memory_gib():.2f} GiB  {duration(left)} left",
            flush=True,
        )
        self._last = (now, total, supervised)


def memory_gib() -> float:
    """Peak memory so far: allocated on the GPU where there is one, else this process's resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
