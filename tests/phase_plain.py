"""A second phase: transformers' plain Trainer on the tokens of `prompt` rows, with no labels of atlas' own and no TRL."""

import hashlib

from datasets import load_dataset
from peft import get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from atlas.config.fields import COMMON_OWNED, COMMON_RECIPE, SCHEMAS, TRL_SOURCES, TrainSchema
from atlas.train.phase import PHASES, Phase, Rows
from atlas.train.resume import Resumable
from atlas.train.run import open_run, phase_command


class PlainRows(Rows):
    def __init__(self, config, tokenizer):
        rows = load_dataset("json", data_files=config.data.train[0].name, split="train")
        self.dataset = rows.map(lambda row: tokenizer(row["text"]), remove_columns=rows.column_names)
        self.fingerprint = hashlib.sha256(str(self.dataset["input_ids"][:]).encode()).hexdigest()


class PlainTrainer(Resumable, Trainer):
    def __init__(self, model, peft_config=None, processing_class=None, **more):
        model = get_peft_model(model, peft_config) if peft_config else model
        collator = DataCollatorForLanguageModeling(processing_class, mlm=False)
        super().__init__(model, processing_class=processing_class, data_collator=collator, **more)


def train(loaded, resume="auto"):
    with open_run(PLAIN, loaded, resume) as run:
        run.prepare()
        if run.finished:
            return run.finished
        trainer = run.trainer(run.load_base_model())
        run.fit(trainer)
        return run.close(trainer)


PLAIN = Phase(
    name="plain",
    method="plain training",
    arguments=lambda: TrainingArguments,
    trainer=lambda: PlainTrainer,
    rows=PlainRows,
    sample=lambda tokenizer: [{"input_ids": [tokenizer.eos_token_id] * 8}] * 2,
)
SCHEMAS["plain"] = TrainSchema(TRL_SOURCES[:1], COMMON_OWNED, COMMON_RECIPE)
PHASES["plain"] = "phase_plain:PLAIN"


main = phase_command("plain", train)


if __name__ == "__main__":
    raise SystemExit(main())
