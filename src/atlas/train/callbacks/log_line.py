"""One line of progress per `train.logging_steps`."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atlas.console import duration
from atlas.device import memory_gib


class LogLine(TrainerCallback):
    """Prints loss, learning rate, gradient norm, tokens per second (supervised ones too, where they are logged), memory and time
    left. Rates count from the last line; `begin` sets the first one."""

    def begin(self, state: TrainerState, tokens: int, result: dict[str, Any]) -> None:
        """Training begins, or goes on from a checkpoint that has been restored, with these tokens and results so far."""
        self._last = (time.perf_counter(), tokens, result.get("supervised_tokens", 0))
        self._began = (time.perf_counter(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:  # `logging_steps` may not meet the last one, whose loss is the result
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}", flush=True)
        if "loss" not in logs:
            return
        now, tokens = time.perf_counter(), int(logs.get("num_tokens", 0))
        supervised = int(logs.get("supervised_tokens", 0))
        seconds = max(now - self._last[0], 1e-9)
        steps = max(state.global_step - self._began[1], 1)
        left = (now - self._began[0]) / steps * (state.max_steps - state.global_step)
        rates = {" supervised tok/s": supervised - self._last[2], " tok/s": tokens - self._last[1]}
        width = len(str(state.max_steps))
        parts = [
            f"step {state.global_step:>{width}}/{state.max_steps}",
            f"loss {logs['loss']:.4f}",
            f"lr {logs['learning_rate']:.2e}",
            f"grad {logs['grad_norm']:.3f}" if "grad_norm" in logs else "grad skipped",  # by the loss scaler
            *(f"{count / seconds:,.0f}{unit}" for unit, count in rates.items() if count > 0),
            f"{memory_gib():.2f} GiB",
            f"{duration(left)} left",
        ]
        print("  ".join(parts), flush=True)
        self._last = (now, tokens, supervised)
