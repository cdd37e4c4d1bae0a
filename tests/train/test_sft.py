"""The job end to end through its entry point, on a tiny real model: NF4, LoRA, SFTTrainer, files on disk."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from atlas.config import load_config
from atlas.models.adapters import cast_trainable_to_fp32, lora_b_norm, lora_config, refuse_non_finite
from atlas.models.base import load_base_model_and_tokenizer
from atlas.train import sft
from atlas.train.arguments import available_trackers
from atlas.train.checkpoints import checkpoints, damage
from rows import ROOT, chat, write_rows
from runs import loaded, without_weights

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}


def logits_from_disk(base: Path, adapter: Path, text: str) -> torch.Tensor:
    """What anybody would write to use the result."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**NF4), dtype=torch.float32, device_map={"": "cpu"}
    )
    for layer in model.modules():
        # bitsandbytes rounds to bfloat16 in evaluation on CPUs that can; bits are compared here, so both sides take one kernel.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_run_saves_what_it_trained(sft_args: list[str], base_folder: Path, tmp_path: Path, capfd):
    run = sft.train(loaded([*sft_args, "train.max_steps=6"]))
    folder = run.folder

    text = "<|im_start|>user\nWhere does Mira live?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = run.trainer.model.eval()(**tokenizer(text, return_tensors="pt")).logits
    assert torch.equal(logits_from_disk(base_folder, folder, text), expected)

    # eos is the stop token and pad is not, on tokenizer, model config and generation config; the template is the patched one.
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "{%- generation %}" in tokenizer.chat_template
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert generation.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert run.trainer.model.config.eos_token_id == tokenizer.eos_token_id
    assert run.trainer.model.config.pad_token_id == tokenizer.pad_token_id

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config_hash"] == loaded([*sft_args, "train.max_steps=6"]).config_hash
    result = manifest["result"]
    assert result["steps"] == 6 and result["lora_b_norm"] == lora_b_norm(run.trainer.model) > 0
    assert result["supervised_tokens"] > 0 and result["loss_first"] > 5
    operations = 6 * run.trainer.model.num_parameters(exclude_embeddings=True)  # for a token
    assert run.trainer.state.total_flos > 0 and run.trainer.state.total_flos % operations == 0
    assert manifest["data"]["sources"][0]["used"] == 120 and len(manifest["data"]["fingerprint"]) == 64
    assert manifest["versions"]["trl"] and manifest["device"]["model.dtype"] == "float32"
    assert len(manifest["chat_template_sha256"]) == 64 and manifest["command"]

    out = capfd.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 6

    parts = result["start_seconds"]
    assert list(parts) == ["imports", "preflight", "data", "model", "trainer", "first_step"]
    assert parts["model"] > 0 and sum(parts.values()) <= result["seconds"] - result["train_seconds"] * 0.5
    said = "start: [0-9.]+ s to the end of the first step \\(" + ", ".join(
        f"{n.replace('_', ' ')} [0-9.]+" for n in parts
    )
    assert len(re.findall(said, out)) == out.count("start: ") == 1 and out.index("start: ") < out.index(steps[0])
    for part in ("loss ", "lr ", "grad ", "supervised tok/s", "tok/s", "GiB", "left"):
        assert part in steps[0]
    assert "dtype" in out and "CPU" in out and "120 rows read, 120 used" in out
    assert f"saved in {folder}" in out and "LoRA B norm" in out


def test_training_learns(sft_args: list[str], tmp_path: Path):
    rows = write_rows(tmp_path / "one.jsonl", [chat("Say it.", "The mill stands by the river.")] * 8)
    run = sft.train(loaded([*sft_args, f"data.train={rows}", "train.max_steps=40", "train.learning_rate=2e-2"]))
    result = run.manifest["result"]
    assert result["loss_last"] < result["loss_first"] - 0.5, result  # a random frozen base: the adapter alone does it


def test_trainable_parameters_are_float32_and_lora_only(sft_args: list[str]):
    run = sft.train(loaded([*sft_args, "train.max_steps=1"]))
    trainable = {n: p for n, p in run.trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert all("lora_" in name for name in trainable)
    # r x (in + out) for q, k, v, o, gate, up, down of two layers with hidden 64, kv 32, intermediate 128
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert sum(p.numel() for p in trainable.values()) == 2 * 16 * sum(a + b for a, b in shapes)


def test_same_seed_same_adapter_other_seed_another(sft_args: list[str], tmp_path: Path):
    def adapter(name: str, *more: str) -> bytes:
        run = sft.train(loaded([*sft_args, f"output.dir={tmp_path / name}", *more]))
        return (run.folder / "adapter_model.safetensors").read_bytes()

    first = adapter("a")
    assert adapter("b") == first
    assert adapter("c", "train.seed=1") != first


def test_packed_rows_train_too(sft_args: list[str]):
    run = sft.train(loaded([*sft_args, "train.packing=true", "train.max_length=256"]))
    assert run.manifest["result"]["lora_b_norm"] > 0
    assert "seq_lengths" in run.trainer.train_dataset.column_names


def test_without_quantisation(sft_args: list[str], base_folder: Path):
    run = sft.train(loaded([*sft_args, "quantization.load_in_4bit=false"]))
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run.folder).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, run.trainer.model.eval()(ids).logits)


def test_a_finished_run_is_left_as_it_is(sft_args: list[str], capfd):
    folder = sft.train(loaded(sft_args)).folder
    whole = (folder / "adapter_model.safetensors").read_bytes()
    capfd.readouterr()
    assert sft.main(sft_args) == 0
    out = capfd.readouterr().out
    assert "this run is finished" in out and "step " not in out
    assert (folder / "adapter_model.safetensors").read_bytes() == whole
    # An adapter that is not the one the manifest speaks of: the run is not finished.
    (folder / "adapter_model.safetensors").write_bytes(whole[:-1])
    assert sft.main(sft_args) == 0
    assert "step 3/3" in capfd.readouterr().out
    assert (folder / "adapter_model.safetensors").read_bytes() == whole


def test_dump_template_audit_shows_every_token_and_loads_no_model(sft_args: list[str], tmp_path: Path, capfd):
    assert sft.main([*sft_args, "--dump-template-audit", "model.tokenizer_name=" + sft_args[2].split("=")[1]]) == 0
    records = [
        json.loads(line) for line in (tmp_path / "results" / "sft_template_audit.jsonl").read_text().splitlines()
    ]
    assert len(records) >= 8
    row = json.loads(Path(sft_args[3].split("=")[1]).read_text().splitlines()[0])
    first = records[0]
    assert len(first["ids"]) == len(first["tokens"]) == len(first["bytes"]) == len(first["mask"])
    assert bytes.fromhex("".join(first["bytes"])).decode() == first["text"]
    answers = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
    assert first["trained_text"] == "…".join(answers)
    assert not (tmp_path / "out").exists()


# The other tokenizer differs in its end token and default system prompt, which test_audit and `instruct_folder` cover.
@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["base", "instruct"])
def test_recipe_config_with_a_qwen_shaped_model(tokenizer: str, shared: Path, tmp_path: Path):
    """The command of the docs: configs/sft_qwen05b.yaml, the real tokenizer, real conversations; only layers are fewer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=151936,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            eos_token_id=151643,
        )
    )
    model.save_pretrained(tmp_path / "model")
    run = sft.train(
        load_config(
            ROOT / "configs" / "sft_qwen05b.yaml",
            [
                f"model.name={tmp_path / 'model'}",
                f"model.tokenizer_name={shared / f'qwen2.5-tokenizer-{tokenizer}'}",
                f"data.train={shared / 'multiturn' / 'oasst_en_multiturn.jsonl'}:40",
                f"output.dir={tmp_path / 'out'}",
                "train.max_steps=1",
                "train.per_device_train_batch_size=1",
                "train.gradient_accumulation_steps=1",
            ],
        )
    )
    saved = AutoTokenizer.from_pretrained(run.folder)
    assert (saved.eos_token_id, saved.pad_token_id) == (151645, 151643)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        expected = run.trainer.model.eval()(**saved(text, return_tensors="pt")).logits
    assert torch.equal(logits_from_disk(tmp_path / "model", run.folder, text), expected)


def test_adapter_of_the_half_billion_shape_has_8798208_parameters():
    from peft import get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = load_config(ROOT / "configs" / "sft_qwen05b.yaml").config
    with torch.device("meta"):
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=151936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        )
        adapted = get_peft_model(model, lora_config(config.lora))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 8_798_208


def test_fp16_loss_scaling_needs_float32_adapters(sft_args: list[str], monkeypatch: pytest.MonkeyPatch):
    """What fp16 on a T4 does with the optimizer, as far as a CPU reaches: TRL leaves the 4-bit model's adapters in bf16;
    atlas makes them float32, so that GradScaler unscales them, skips an overflowing step and applies the next."""
    from trl import SFTTrainer

    seen: list[torch.dtype] = []

    def spy(model: object, keep: bool) -> int:
        seen.extend({p.dtype for p in model.parameters() if p.requires_grad})  # type: ignore[attr-defined]
        return cast_trainable_to_fp32(model, keep)

    monkeypatch.setattr("atlas.train.run.cast_trainable_to_fp32", spy)
    run = sft.train(loaded([*sft_args, "train.max_steps=1"]))
    assert seen == [torch.bfloat16]  # without the cast this is what GradScaler would meet
    assert isinstance(run.trainer, SFTTrainer)

    model = run.trainer.model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    batch = next(iter(run.trainer.get_train_dataloader()))
    before, scale = lora_b_norm(model), scaler.get_scale()
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(run.trainer.compute_loss(model, dict(batch))).backward()
        if step == 0:
            parameters[0].grad[0, 0] = float("inf")  # what an overflow in fp16 leaves behind
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert lora_b_norm(model) == before and scaler.get_scale() == scale / 2
    assert lora_b_norm(model) != before


def test_a_run_that_changes_nothing_is_a_failure(sft_args: list[str], capfd):
    assert sft.main([*sft_args, "--max-steps", "1"]) == 1  # one step of warm-up: its learning rate is 0
    err = capfd.readouterr().err
    assert "LoRA B is zero" in err and "Train for more than one step: at the first one of a warm-up" in err
    assert sft.main([*sft_args, "--resume", "never", "train.neftune_noise_alpha=1e30"]) == 1
    err = capfd.readouterr().err
    assert "LoRA B is zero" in err and "warm-up" not in err and "train.neftune_noise_alpha" in err


def test_a_run_without_a_step_is_refused_before_the_model_is_loaded(sft_args: list[str], tmp_path: Path, capfd):
    asked = [*sft_args, f"model.name={without_weights(sft_args, tmp_path / 'base')}", "train.dataloader_drop_last=true"]
    for steps in ("3", "-1"):
        assert sft.main([*asked, f"train.max_steps={steps}", "train.per_device_train_batch_size=500"]) == 2
        out, err = capfd.readouterr()
        assert (
            "data.train: 120 rows do not fill one batch of 500" in err and "set train.dataloader_drop_last=false" in err
        )
        assert "done:" not in out


def test_tokenizer_of_another_family_is_refused(sft_args: list[str], tmp_path: Path, capfd):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    small = Qwen2Config(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    Qwen2ForCausalLM(small).save_pretrained(tmp_path / "small")
    tokenizer = sft_args[2].removeprefix("model.name=")
    assert sft.main([*sft_args, f"model.name={tmp_path / 'small'}", f"model.tokenizer_name={tokenizer}"]) == 2
    assert "not of one family" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rte=2e-4", ["train.learning_rte", "'train.learning_rate'"]),
        ("model.tokenizer_name=someone/nothing", ["model.tokenizer_name", "someone/nothing"]),
        ("model.dtype=float16", ["model.dtype", "needs a GPU"]),
        ("data.train=someone/nothing", ["someone/nothing", "Hub"]),
    ],
)
def test_wrong_input_is_one_message_and_exit_status_2(override: str, parts: list[str], sft_args: list[str], capfd):
    assert sft.main([*sft_args, override]) == 2
    err = capfd.readouterr().err
    message = err[err.index("error: ") :]
    assert "Traceback" not in err
    for part in parts:
        assert part in message


def test_wandb_without_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("atlas.train.arguments.find_spec", lambda name: object())
    assert available_trackers("wandb")[0] == []
    assert available_trackers(["wandb", "tensorboard"])[0] == ["tensorboard"]
    assert "wandb login" in available_trackers(["wandb", "tensorboard"])[1]["wandb"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert available_trackers("wandb") == (["wandb"], {})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.delenv("WANDB_MODE")
    assert available_trackers("wandb") == (["wandb"], {})
    monkeypatch.setattr("atlas.train.arguments.find_spec", lambda name: None)
    names, off = available_trackers(["wandb", "tensorboard", "trackio"])
    assert names == [] and "pip install 'atlas-posttraining[trackio]'" in off["trackio"]


def test_model_and_tokenizer_from_a_config_alone(sft_args: list[str]):
    model, tokenizer = load_base_model_and_tokenizer(loaded(sft_args).config)
    assert model.is_loaded_in_4bit and tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id == model.config.eos_token_id


def test_as_a_command(sft_args: list[str], tmp_path: Path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "atlas.train.sft",
            *sft_args,
            "--max-steps",
            "2",
            "--no-push-to-hub",
            "output.hub_repo=a/b",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "step 2/2" in done.stdout
    command = json.loads((tmp_path / "out" / "manifest.json").read_text())["command"]
    assert command.startswith("python -m atlas.train.sft --config ") and "--max-steps 2" in command
    assert "Traceback" not in done.stderr and "\r" not in done.stderr  # no progress bars where nobody watches


@pytest.mark.slow
def test_two_processes_train_one_adapter(sft_args: list[str], tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [*torchrun, "-m", "atlas.train.sft", *sft_args]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainable parameters") == done.stdout.count("120 rows read") == 1
    assert [line.split("/")[0] for line in done.stdout.splitlines() if line.startswith("step ")] == [
        "step 1",
        "step 2",
        "step 3",
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    # Three steps of 2 x 2 rows, against 2 rows a step in one process.
    one = sft.train(loaded([*sft_args, f"output.dir={tmp_path / 'one'}"])).manifest
    assert manifest["result"]["supervised_tokens"] > 1.3 * one["result"]["supervised_tokens"]
    assert manifest["result"]["lora_b_norm"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_one_speaks(rank: int, sft_args: list[str], monkeypatch, capsys):
    # The launcher ends all processes as soon as one has ended: the others have to give the first one time.
    monkeypatch.setattr("atlas.errors.OTHERS_WAIT", 0.5)
    monkeypatch.setenv("RANK", str(rank))
    began = time.monotonic()
    assert sft.main([*sft_args, "train.learning_rte=1"]) == 2
    waited = time.monotonic() - began
    said = capsys.readouterr().err
    assert (waited > 0.5) == (rank == 1)
    assert said.startswith("error (process 1): " if rank else "error: ") and said.count("unknown key") == 1


GOOD = [chat(f"Question {i}", "Answer") for i in range(10)]
WRONG_ROWS = {
    "not JSON in line 7": ([*GOOD[:6], '{"messages": [', *GOOD[6:]], ["line 7", "not JSON", "1 of 11 rows"]),
    "assistent": (
        [*GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "assistent", "content": "b"}]}],
        ["line 11", "'assistent'", "did you mean 'assistant'?"],
    ),
}


def test_weights_that_the_files_lack_are_not_made_up(sft_args: list[str], tmp_path: Path, capfd):
    assert sft.main([*sft_args, f"model.name={without_weights(sft_args, tmp_path / 'model')}"]) == 2
    assert "lack 27 weights that its config.json asks for" in capfd.readouterr().err


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_wrong_data_is_one_message_and_exit_status_2(name: str, sft_args: list[str], tmp_path: Path, capfd):
    rows, parts = WRONG_ROWS[name]
    path = write_rows(tmp_path / "wrong.jsonl", rows)
    model = without_weights(sft_args, tmp_path / "model")
    assert sft.main([*sft_args, f"data.train={path}", f"model.name={model}"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err and "model.name" not in err  # said before the model is loaded
    for part in [str(path), *parts]:
        assert part in err[err.index("error: ") :]


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "special token that ends the turn"),
        ("{{ raise_exception('no') }}", "cannot render a conversation: TemplateError: no."),
    ],
)
def test_unusable_templates_are_exit_status_2(
    template: str | None, part: str, sft_args: list[str], tmp_path: Path, capfd
):

    shutil.copytree(sft_args[2].split("=")[1], tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    if template:
        (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    assert sft.main([*sft_args, f"model.tokenizer_name={tmp_path / 'tokenizer'}"]) == 2
    err = capfd.readouterr().err
    assert part in err and "Traceback" not in err


@pytest.mark.parametrize("often", [1, 10])
def test_a_run_that_diverges_at_once_may_have_a_broken_base(often: int, sft_args: list[str], tmp_path: Path, capfd):
    folder = Path(shutil.copytree(sft_args[2].split("=")[1], tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert sft.main([*sft_args, f"model.name={folder}", f"train.logging_steps={often}"]) == 1
    err = capfd.readouterr().err
    assert "the loss of step 1 is not finite" in err and "the weights of model.name may be broken" in err


@pytest.mark.parametrize("often", [1, 10])
def test_a_run_that_diverges_is_no_success(often: int, sft_args: list[str], tmp_path: Path, capfd):
    wild = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.max_steps=20", "train.max_grad_norm=0"]
    wild += ["train.save_strategy=steps", "train.save_steps=1", f"train.logging_steps={often}"]
    assert sft.main([*sft_args, *wild]) == 1
    out, err = capfd.readouterr()
    folder = tmp_path / "out"
    assert "the run has diverged: " in err and re.search(r"step \d+", err) and "Lower train.learning_rate" in err
    assert "Traceback" not in err and "done:" not in out
    last = checkpoints(folder)[0]
    assert f"{last} is the last checkpoint from before" in err and damage(last) is None
    refuse_non_finite(last)
    assert not (folder / "manifest.json").exists() and not (folder / "adapter_model.safetensors").exists()
    for path in folder.rglob("*.json"):
        assert not re.search(r"\b(NaN|Infinity)\b", path.read_text()), path


@pytest.mark.parametrize("kind", [[], ["train.packing=true", "train.max_length=256"]])
def test_the_held_out_loss_is_one_of_tokens_whatever_the_batch(kind: list[str], sft_args: list[str], rows_file: Path):
    """7 rows of other lengths, so that batches of 4 end with 3; against the mean over all supervised tokens, one row at a time."""
    trained = [*sft_args, *kind, f"data.eval={rows_file}:7", "quantization.load_in_4bit=false"]
    # The step before the evaluation has a learning rate of 0: the model is the untrained one, the same in each run.
    trained += ["train.max_steps=1", "train.warmup_steps=1"]
    found = []
    for size in (1, 4, 8):
        run = sft.train(loaded([*trained, f"train.per_device_eval_batch_size={size}"]))
        shutil.rmtree(run.folder)
        line = next(line for line in run.trainer.state.log_history if "eval_loss" in line)
        found.append([line["eval_loss"], line["eval_mean_token_accuracy"], line["eval_entropy"]])
    assert run.manifest["result"]["eval_loss"] == found[-1][0]
    total = count = 0.0
    for row in run.trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = run.trainer.model.eval()(input_ids=ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    assert [value[0] for value in found] == pytest.approx([total / count] * 3, abs=1e-5)
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0] == pytest.approx(found[2], abs=1e-5)
