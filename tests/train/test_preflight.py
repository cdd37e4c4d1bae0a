"""Every way in which a run would end badly is found before data or a model is loaded, and all of them together."""

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from atlas.config import load_config
from atlas.data import commands
from atlas.errors import UserError
from atlas.train import preflight, sft
from atlas.train.preflight.estimate import per_device_bytes
from hub_commands import WANDB, WRITE, atlas
from hub_server import HubServer
from rows import write_rows
from runs import TrainedRun


def test_a_sound_run_is_ready_and_nothing_is_written(sft_args: list[str], tmp_path: Path, capsys):
    assert preflight.main(sft_args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "this run can start"
    status = {line[8:].split("  ")[0]: line[2:6].strip() for line in lines[:-1]}
    skipped = {"Hub", "tracker", "network"}
    named = [
        "config",
        "launch",
        "device",
        "libraries",
        "training",
        "data",
        "tokenizer",
        "disk",
        "strategy",
        "memory",
        "cache",
        "loss",
        "trainer",
    ]
    assert status == dict.fromkeys((*named, "output folder", "results", "base model"), "ok") | dict.fromkeys(
        skipped, "skip"
    )
    # 3 steps x 2 rows x gradient accumulation 1 of at most 256 tokens
    assert "3 steps of 2 rows, at most 256 tokens each, 1,536 tokens at most" in "\n".join(lines)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a package of a given version before all others, as an image brings it along."""
    from peft import import_utils

    def install(name: str, version: str) -> None:
        monkeypatch.syspath_prepend(tmp_path / "site")
        described = tmp_path / "site" / f"{name}-{version}.dist-info" / "METADATA"
        described.parent.mkdir(parents=True)
        described.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if name == "torchao":
            (tmp_path / "site" / name).mkdir()
            (tmp_path / "site" / name / "__init__.py").touch()

    import_utils.is_torchao_available.cache_clear()
    yield install
    import_utils.is_torchao_available.cache_clear()


def test_a_package_that_peft_refuses_is_one_line(sft_args: list[str], trained_run: TrainedRun, installed, capsys):
    """Colab's and Kaggle's images bring torchao 0.10; nothing here uses it, but PEFT raises wherever an adapter is made."""
    installed("torchao", "0.10.0")
    assert preflight.main(sft_args) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("  fail")]
    assert "libraries" in line and "PEFT refuses torchao" in line and "0.10.0" in line
    assert "`pip uninstall -y torchao`" in line and err.count("\n") == 1
    from atlas.eval import generate

    assert generate.main(["--adapter", str(trained_run.folder), "Hi"]) == 2
    assert "`pip uninstall -y torchao`" in capsys.readouterr().err


def test_a_library_that_is_too_old_is_one_line(sft_args: list[str], installed, capsys):
    installed("trl", "0.19.1")
    assert preflight.main(sft_args) == 2
    assert (
        "trl 0.19.1 is installed, atlas needs <1.17,>=1.16: `pip install -U 'trl<1.17,>=1.16'`"
        in capsys.readouterr().err
    )


def damaged_model(base: Path, folder: Path, damage: Callable[[Path], object]) -> str:
    shutil.copytree(base, folder)
    damage(folder)
    return str(folder)


def in_shards(folder: Path) -> None:
    """Two files of weights, of which the second is missing."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    first = {name: weights[name] for name in names[:5]}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    files = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def too_big(folder: Path) -> None:
    path = folder / "config.json"
    huge = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 8, "layer_types": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | huge))


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["vocabulary files"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["holds no model.safetensors"]),
    "half of them": (lambda f: os.truncate(f / "model.safetensors", 9000), ["model.safetensors is damaged"]),
    "a shard missing": (in_shards, ["model-00002-of-00002.safetensors is missing"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["model.name", "cannot be loaded"]),
    "unknown type": (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), ["cannot be loaded"]),
    "not for text": (
        lambda f: (f / "config.json").write_text('{"model_type": "vit", "vocab_size": 9999}'),
        ["model.name", "cannot be loaded as a language model"],
    ),
    "too big": (too_big, ["memory: ", "only", "GiB are free"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_base_model_that_cannot_be_trained(name: str, base_folder: Path, sft_args: list[str], tmp_path: Path, capsys):
    damage, parts = MODELS[name]
    model = damaged_model(base_folder, tmp_path / "model", damage)
    tokenizer = model if name == "no tokenizer" else base_folder
    began = time.monotonic()
    assert preflight.main([*sft_args, f"model.name={model}", f"model.tokenizer_name={tokenizer}"]) == 2
    assert time.monotonic() - began < 20
    out, err = capsys.readouterr()
    assert "  fail  " in out and err.count("error: ") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err


OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "no folder": (["model.name=./nowhere"], ["model.name: there is no folder ./nowhere"]),
    "no such layers": (
        ["lora.target_modules=[attention]"],
        ["lora.target_modules: Target modules {'attention'} not found"],
    ),
    "no such file": (["data.train=./nowhere.jsonl"], ["data: the file nowhere.jsonl does not exist"]),
    "nothing can be written": (["output.dir=/proc/out"], ["output.dir: nothing can be written to /proc"]),
    "tracker": (["train.report_to=mlflow"], ["train.report_to: 'mlflow' is not installed", "report_to=none"]),
    "nothing to evaluate on": (["train.eval_strategy=epoch"], ["there is no held-out data"]),
    "nothing to evaluate on at the start": (
        ["train.eval_on_start=true"],
        ["train.eval_on_start=True: there is no held"],
    ),
    "a file": (["output.dir=/dev/null"], ["output.dir: /dev/null is a file or a broken link"]),
    "below a file": (["output.dir=/dev/null/x"], ["output.dir: nothing can be written to /dev (Not a directory)"]),
    "a name too long": (["output.dir=" + "x" * 300], ["output.dir: nothing can be written to", "File name too long"]),
    "loss": (["train.loss_type=nil"], ["train.loss_type=nil: Invalid `loss_type`"]),
    "schedule": (["train.lr_scheduler_type=cosin"], ["train.lr_scheduler_type=cosin: cosin is not a valid"]),
    "schedule's values": (
        ["train.lr_scheduler_kwargs.num_cycle=3"],
        ["train.lr_scheduler_kwargs={'num_cycle': 3}: TypeError", "unexpected keyword argument 'num_cycle'"],
    ),
    "schedule's values, after the warm-up": (
        ["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={power: nan}"],
        ["train.lr_scheduler_kwargs={'power': 'nan'}: TypeError"],
    ),
    "the same in a long run": (
        ["train.lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={power: nan}", "train.max_steps=300"],
        ["train.lr_scheduler_kwargs={'power': 'nan'}: TypeError"],
    ),
    "best of what": (
        ["data.eval_fraction=0.2", "train.save_strategy=best"],
        ["train.save_strategy=best: `args.metric_for_best_model` must be provided"],
    ),
    "a package": (
        ["train.use_liger_kernel=true"],
        ["train.use_liger_kernel=true: the package liger-kernel is not installed"],
    ),
    "the head": (
        ["lora.target_modules=[lm_head]"],
        ["lora.target_modules: Applying a PEFT adapter to `lm_head` is not"],
    ),
    "optimizer": (["train.optim=adamw_torchx"], ["train.optim=adamw_torchx: adamw_torchx is not a valid"]),
    "optimizer's values": (["train.optim_args=x"], ["train.optim_args=x: not enough values to unpack"]),
    "workers": (
        ["train.dataloader_persistent_workers=true"],
        ["train.dataloader_persistent_workers=True: persistent_"],
    ),
    "packs": (
        ["train.packing=true", "train.packing_strategy=foo"],
        ["train.packing_strategy=foo: Invalid packing strategy"],
    ),
    "checkpointing's values": (
        ["train.gradient_checkpointing=true", "train.gradient_checkpointing_kwargs.a=1"],
        ["train.gradient_checkpointing_kwargs={'a': 1}: Unexpected keyword arguments: a"],
    ),
    "strategy": (["train.strategy=fsdp2"], ["train.strategy=fsdp2: needs several processes", "atlas launch --nproc 2"]),
    "precision": (["train.fp16=true"], ["train.fp16 asks for float16, which needs a GPU"]),
    "a share of the disk": (["lora.r=4000000"], ["output.dir: ", "make room", "train.save_total_limit"]),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_what_a_config_cannot_have(name: str, sft_args: list[str], capsys):
    overrides, parts = OVERRIDES[name]
    assert preflight.main([*sft_args, *overrides]) == 2
    out, err = capsys.readouterr()
    assert "  fail  " in out
    for part in parts:
        assert part in err


def test_a_loss_on_all_tokens_is_said_everywhere(sft_args: list[str], tmp_path: Path, capsys):
    asked = [*sft_args, "train.assistant_only_loss=false", f"output.results_dir={tmp_path / 'results'}"]
    assert preflight.main(sft_args) == 0
    assert "ok    loss           on the assistant's content" in capsys.readouterr().out
    assert preflight.main(asked) == 0
    assert "warn  loss           on ALL tokens, prompts too" in capsys.readouterr().out
    assert commands.audit(asked) == 0
    assert "LOSS ON ALL TOKENS, prompts too, and nothing is audited" in capsys.readouterr().out
    assert sft.main(asked) == 0
    out = capsys.readouterr().out
    assert "warn  loss           on ALL tokens" in out and "LOSS ON ALL TOKENS" in out
    assert "Its loss fell on all tokens" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("base", [None, "base: null\n"])
def test_a_config_of_three_keys_trains_on_answers_alone(
    base: str | None, base_folder: Path, rows_file: Path, tmp_path: Path, capsys
):
    own = tmp_path / "own.yaml"
    own.write_text(
        f"{base or ''}model: {{name: {base_folder}}}\ndata: {{train: {rows_file}}}\noutput: {{dir: {tmp_path}}}\n"
    )
    assert commands.audit(["--config", str(own), f"output.results_dir={tmp_path / 'results'}"]) == 0
    out = capsys.readouterr().out
    share = float(out.split("tokens (")[1].split("%")[0])
    assert "audit clean: the loss falls on exactly" in out and 10 < share < 80


def test_embeddings_can_be_trained(sft_args: list[str], capsys):
    asked = [*sft_args, "lora.target_modules=[embed_tokens]", "quantization.load_in_4bit=false"]
    assert sft.main([*asked, "train.learning_rate=5e-2", "train.warmup_steps=0"]) == 0
    assert "LoRA B norm 0.0000" not in capsys.readouterr().out


def test_a_results_folder_that_cannot_be_written_to(sft_args: list[str], tmp_path: Path, capsys):
    """One message before any row is read; a run, which writes nothing there, is only warned."""
    (tmp_path / "results").write_text("a file")
    no_folder = f"output.results_dir: {tmp_path / 'results'} is a file or a broken link"
    for command in (commands.audit, commands.data, lambda given: sft.main([*given, "--dump-template-audit"])):
        assert command(sft_args) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {no_folder}") and "output.results_dir=..." in said.err and not said.out
    assert commands.audit([*sft_args, "output.results_dir=/proc/results"]) == 2
    assert "output.results_dir: nothing can be written to /proc" in capsys.readouterr().err
    assert preflight.main(sft_args) == 0
    assert re.search(f"  warn  results +{re.escape(no_folder)}", capsys.readouterr().out)


def test_all_failures_at_once_and_training_does_not_start(sft_args: list[str], tmp_path: Path, capsys):
    empty = write_rows(tmp_path / "empty.jsonl", [])
    wrong = [f"data.train={empty}", "lora.target_modules=[x]", "output.dir=/proc/out", "train.report_to=mlflow"]
    for main in (preflight.main, sft.main):
        assert main([*sft_args, *wrong]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: 4 things would end this run badly:\n       - output.dir: ")
        assert err.count("\n       - ") == 4 and out.count("  fail  ") == 4
        for part in ("report_to: 'mlflow'", f"the file {empty} is empty", "lora.target_modules"):
            assert part in err
        assert "step 1" not in out and "supervised" not in out


def test_a_finished_run_of_another_config_is_not_overwritten(sft_args: list[str], tmp_path: Path, capsys):
    assert sft.main(sft_args) == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    other = [*sft_args, "train.learning_rate=1e-3"]
    for main in (preflight.main, sft.main):
        assert main(other) == 2
        err = capsys.readouterr().err
        assert f"{tmp_path / 'out'} holds a finished run" in err and "--resume never" in err
        assert "train.learning_rate (0.004 there, 0.001 here)" in err
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert preflight.main([*other, "--resume", "never"]) == 0
    assert "  warn  output folder" in capsys.readouterr().out
    assert preflight.main(sft_args) == 0  # its own

    # Of a manifest that atlas did not write, or not whole, nothing is known but that it is not this run's.
    manifest = tmp_path / "out" / "manifest.json"
    whole = manifest.read_text()
    for strange, said in (
        ('{"data": null}', "manifest.json is not one of atlas"),
        ('{"config_hash": "0", "data": [], "experiment": []}', "the keys that differ are not recorded"),
    ):
        manifest.write_text(strange)
        assert preflight.main(sft_args) == 2
        assert said in capsys.readouterr().err
    manifest.write_text(whole)

    # The same config on other rows is seen as soon as the rows are known, before the model is loaded.
    data = Path(sft_args[3].partition("=")[2])
    rows = write_rows(tmp_path / data.name, data.read_text().splitlines()[:50])
    assert sft.main([*sft_args, f"data.train={rows}"]) == 2
    out, err = capsys.readouterr()
    assert "holds a finished run" in err and "the training data have changed since" in err and "step 1" not in out
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert sft.main([*other, "--resume", "never"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_a_run_that_goes_on_needs_no_room_for_what_it_has(sft_args: list[str], monkeypatch, capsys):
    asked = [*sft_args, "train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=3"]
    assert sft.main(asked) == 0
    usage = shutil.disk_usage("/")._replace(free=900_000)  # one checkpoint and the adapter; four take 2 MB
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert preflight.main(asked) == 0
    capsys.readouterr()
    assert preflight.main([*asked, "output.dir=" + asked[4].partition("=")[2] + "_elsewhere"]) == 2
    assert "make room" in capsys.readouterr().err


def test_a_bitsandbytes_that_cannot_be_imported(sft_args: list[str], tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('CUDA Setup failed despite GPU being available')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert preflight.main(sft_args) == 2
    out, err = capsys.readouterr()
    assert "cannot be imported (CUDA Setup failed despite GPU being available)" in err
    assert "quantization.load_in_4bit=false" in err and out.count("  fail  ") == 1


def test_the_memory_of_a_quantised_model(sft_args: list[str]):
    """Against the tensors of the model that the run then has."""
    from bitsandbytes.nn import Params4bit

    loaded = load_config(sft_args[1], sft_args[2:])
    ready = preflight.preflight(loaded)
    run = sft.train(loaded)
    assert run.trainer is not None
    parameters = list(run.trainer.model.parameters())
    packed = [p for p in parameters if isinstance(p, Params4bit)]
    constants = sum(p.quant_state.absmax.nbytes + p.quant_state.state2.absmax.nbytes for p in packed)
    adapter = sum(p.numel() for p in parameters if p.requires_grad)
    others = sum(p.nbytes for p in parameters if not isinstance(p, Params4bit) and not p.requires_grad)
    assert ready.shape.linear == 2 * sum(p.nbytes for p in packed) and ready.shape.trained == adapter
    expected = sum(p.nbytes for p in packed) + constants + others + adapter * 16
    assert per_device_bytes(loaded.config, ready.plan, ready.shape).peak() == pytest.approx(expected, rel=0.001)


@pytest.fixture
def wandb_server() -> Iterator[str]:
    """What W&B answers to a key that it does not know."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(401)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.xdist_group("processes")
def test_a_key_that_wandb_does_not_know(
    hub: HubServer,
    wandb_server: str,
    sft_args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    asked = [*sft_args, "train.report_to=wandb"]
    done = atlas(hub, "preflight", *asked, WANDB_API_KEY=WANDB, WANDB_BASE_URL=wandb_server)
    assert done.status == 2 and "wandb cannot be used" in done.message and "401" in done.message
    assert "WANDB_MODE=offline" in done.message and WANDB not in done.message + done.out
    monkeypatch.setenv("HOME", "/nonexistent")
    assert preflight.main(asked) == 0
    assert "warn  tracker        wandb off: no credentials" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert preflight.main(asked) == 0
    assert "ok    tracker        wandb" in capsys.readouterr().out


UPLOAD = """
import sys
from huggingface_hub import HfApi
for repo, ignored in (("ann/base", []), ("ann/bare", ["*.safetensors"])):
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=sys.argv[1], ignore_patterns=ignored)
"""


@pytest.mark.xdist_group("processes")
def test_a_base_model_that_does_not_fit_the_cache(hub: HubServer, base_folder: Path, sft_args: list[str]):
    assert atlas(hub, "-c", UPLOAD, str(base_folder)).status == 0
    files = hub.repos["ann/base"].commits[hub.repos["ann/base"].head]
    files["model.safetensors"] = replace(files["model.safetensors"], size=2**60)
    done = atlas(hub, "preflight", *sft_args, "model.name=ann/base", f"model.tokenizer_name={base_folder}")
    assert done.status == 2 and "the base model takes 1,073,741,824.0 GiB" in done.message and "HF_HOME" in done.message


SEVERAL = """
import json, sys
from atlas.train import preflight
for arguments in json.loads(sys.argv[1]):
    print("exit status", preflight.main(arguments), flush=True)
    print("----", file=sys.stderr, flush=True)
"""


@pytest.mark.xdist_group("processes")
def test_names_of_the_hub(hub: HubServer, base_folder: Path, sft_args: list[str], tmp_path: Path):
    assert atlas(hub, "-c", UPLOAD, str(base_folder)).status == 0
    asked = [*sft_args, "output.hub_repo=ann/tuned"]
    three = [["model.name=ann/base"], ["model.name=ann/bare", "data.train=ann/rows"], ["--no-push-to-hub"]]
    done = atlas(hub, "-c", SEVERAL, json.dumps([[*asked, *more] for more in three]))
    there, bare, local, _ = re.split(r"(?<=exit status \d)\n", done.out)
    assert there.endswith("0") and "ok    base model     ann/base: 0." in there
    assert "ok    cache          0.5 MiB of base model to download; about 0.1 MiB for the prepared data" in there
    assert f"ok    network        {hub.url}" in there and "ann/tuned can be written to" in there
    nothing, message, nothing_either, _ = done.message.split("----\n")
    assert bare.endswith("2") and "'ann/bare' holds no model.safetensors" in message
    assert "data: 'ann/rows' (split 'train') cannot be loaded from the Hub" in message
    assert local.endswith("0") and "skip  Hub            nothing is pushed" in local
    assert nothing == nothing_either == ""

    offline = atlas(hub, "preflight", *asked, "model.name=ann/base", HF_HUB_OFFLINE="1")
    assert offline.status == 2  # its config.json is cached now, its weights are not
    assert "the cache (HF_HUB_OFFLINE is set) holds no model.safetensors" in offline.message
    assert "skip  Hub            HF_HUB_OFFLINE is set: you can push to ann/tuned later" in offline.out

    gone = atlas(hub, "preflight", *sft_args, "model.name=ann/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.status == 1 and gone.seconds < 90  # the libraries would try for half a minute for each file
    assert "the Hub cannot be reached" in gone.message and "set HF_HUB_OFFLINE=1" in gone.message
    assert WRITE not in gone.out + gone.message


def test_activations_are_recomputed_only_where_they_do_not_fit(
    sft_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys
):
    """The estimate is taken at the free memory of this machine and of smaller ones: first for rows of max_length, then, where
    those do not fit, for the longest rows that there are."""
    import psutil

    here = psutil.virtual_memory()

    def plan(free: int | None, *more: str) -> tuple[bool | None, str, str]:
        memory = here if free is None else here._replace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        ready = preflight.preflight(load_config(sft_args[1], [*sft_args[2:], *more]))
        _, reason = ready.plan.decided["train.gradient_checkpointing"]
        assert bool(ready.plan.gradient_checkpointing) is ready.arguments.activation_checkpointing
        return ready.plan.gradient_checkpointing, reason, next(x.status for x in ready.lines if x.name == "memory")

    on, reason, status = plan(None)
    assert on is False and status == "ok" and "with all activations of 2 x 256 tokens" in reason
    on, reason, status = plan(14 * 2**20)
    assert on is None and reason.endswith("rows may be shorter") and status == "ok"
    assert plan(6 * 2**20, "train.gradient_checkpointing=false") == (False, "set in the config", "warn")
    assert plan(2**40, "train.gradient_checkpointing=true") == (True, "set in the config", "ok")

    def trained(free: int) -> tuple[bool, str]:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: here._replace(available=free))
        capsys.readouterr()
        run = sft.train(load_config(sft_args[1], [*sft_args[2:], "train.max_steps=1"]), resume="never")
        said = re.search(r"^gradient checkpointing (on|off): (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert run.trainer is not None and said is not None
        on = run.trainer.model.is_gradient_checkpointing
        assert on is (said[1] == "on") is run.manifest["device"]["train.gradient_checkpointing"]
        return on, said[2]

    on, reason = trained(14 * 2**20)
    assert not on and re.search(r"with all activations of \d x \d+ tokens", reason)
    on, reason = trained(7 * 2**20)
    assert on and "MiB with it, and a process may hold 1.8 times as much" in reason


OTHERS = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
OTHERS |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("name", "sizes", "more", "attention"),
    [
        ("gemma2", OTHERS, [], ("eager", "transformers has no sdpa for gemma2")),
        (
            "gpt2",  # its linear layers are none of torch's
            {"vocab_size": 2000, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 512},
            ["lora.target_modules=[c_attn,c_fc]", "quantization.load_in_4bit=false"],
            ("sdpa", "in torch, needs no extra package"),
        ),
    ],
)
def test_other_architectures_train(
    name: str,
    sizes: dict,
    more: list[str],
    attention: tuple[str, str],
    sft_args: list[str],
    base_folder: Path,
    tmp_path,
):
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base_folder, tmp_path / name)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).save_pretrained(tmp_path / name)
    arguments = [*sft_args, f"model.name={tmp_path / name}", *more]
    run = sft.train(load_config(arguments[1], [*arguments[2:], "train.max_steps=2"]))
    assert run.trainer is not None and run.manifest["result"]["lora_b_norm"] > 0
    assert run.manifest["device"]["model.attn_implementation"] == attention[0]
    if attention[0] == "eager":
        with pytest.raises(UserError, match=attention[1]):
            sft.train(load_config(arguments[1], [*arguments[2:], "model.attn_implementation=sdpa"]), resume="never")
