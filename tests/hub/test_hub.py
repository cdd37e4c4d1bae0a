"""Pushing and pulling with the real huggingface_hub, in processes of their own, against a stand-in that fails when told to."""

import contextlib
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from atlas.errors import UserError
from atlas.hub import push
from atlas.pocket.base import PocketPaths
from hub_commands import BOB, READ, WANDB, WRITE, WRONG, Done, atlas, serving, start
from hub_server import FOREVER, HubServer
from rows import ROOT
from runs import TrainedRun

pytestmark = pytest.mark.xdist_group("processes")
REPO = "ann/tuned"
LFS = {"HF_HUB_DISABLE_XET": "1"}
PUSHED = {
    "audit_summary.json",
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "manifest.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def run(trained_run: TrainedRun, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(trained_run.folder, tmp_path / "my run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "push.json"}


@pytest.mark.parametrize("env", [{}, LFS], ids=["xet", "lfs"])
def test_push_is_one_commit_of_the_allow_list(env: dict[str, str], hub: HubServer, run: Path):
    (run / "training_args.bin").write_bytes(b"pickled")
    (run / "checkpoint-3").mkdir()
    done = atlas(hub, "push", str(run), REPO, **env)
    assert done.status == 0 and hub.commits(REPO) == 1
    assert hub.files(REPO).keys() - {".gitattributes"} == PUSHED
    assert hub.repos[REPO].private
    assert hub.count("xet_token") == (0 if env else 1) and hub.count("blob") == (1 if env else 0)
    receipt = json.loads((run / "push.json").read_text())
    assert receipt["repo"] == REPO and receipt["revision"] == hub.repos[REPO].head == done.revision

    again = atlas(hub, "push", str(run), REPO, **env)
    assert again.status == 0 and "no new commit" in again.out and again.revision == done.revision
    assert hub.commits(REPO) == hub.count("commit") == 1


def test_a_folder_that_cannot_be_written_is_pushed_all_the_same(hub: HubServer, run: Path):
    (run / "manifest.json").write_text("{}")  # of no use for a card
    (run / "push.json").mkdir()
    done = atlas(hub, "push", str(run), REPO)
    assert done.status == 0 and hub.commits(REPO) == 1 and done.message == ""
    assert "the card stays as it is" in done.out and "push.json is not written" in done.out


def test_public_where_asked(hub: HubServer, run: Path):
    assert atlas(hub, "push", str(run), REPO, "--public").status == 0
    assert not hub.repos[REPO].private


def test_only_what_differs_goes_up_and_nothing_stale_stays(hub: HubServer, run: Path):
    atlas(hub, "push", str(run), REPO, **LFS)
    (run / "generation_config.json").unlink()
    (run / "chat_template.jinja").write_text("{{ messages }}")
    done = atlas(hub, "push", str(run), REPO, **LFS)
    assert done.status == 0 and hub.commits(REPO) == 2 and hub.count("blob") == 1
    assert hub.files(REPO)["chat_template.jinja"].content == b"{{ messages }}"
    assert "generation_config.json" not in hub.files(REPO)  # would have set another run's stop tokens
    assert {"README.md", ".gitattributes", "adapter_model.safetensors"} < hub.files(REPO).keys()


PASSING = {
    "429 once": ("preupload", {"status": 429, "headers": {"Retry-After": "1"}}, {}, "rate limit"),
    "429 in the Hub's words": ("commit", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=1'}}, {}, "rate limit"),
    "503 twice": ("commit", {"times": 2}, {}, "has a problem (503)"),
    "503 before anything": ("create", {"times": 2}, {}, "has a problem (503)"),
    "cut in preupload": ("preupload", {"kind": "cut"}, {}, ""),
    "cut in blob": ("blob", {"kind": "cut"}, LFS, ""),
    "cut in Xet": ("xet_token", {"kind": "cut"}, {}, ""),
    "cut in commit": ("commit", {"kind": "cut"}, {}, "cannot be reached"),
    "cut in commit, LFS": ("commit", {"kind": "cut"}, LFS, "cannot be reached"),
    "answer lost after the commit": ("commit", {"kind": "lose"}, {}, "cannot be reached"),
    "answer lost after the commit, LFS": ("commit", {"kind": "lose"}, LFS, "cannot be reached"),
    "answer lost after the repo was made": ("create", {"kind": "lose"}, {}, "cannot be reached"),
    "the address of the storage had expired": ("blob", {"status": 403}, LFS, "may have expired"),
    "verified too early": ("verify", {"status": 404}, LFS, "it may be late"),
    "verified while it may not be": ("verify", {"status": 403}, LFS, "the storage of large files refuses (403)"),
    "no token for Xet yet": ("xet_token", {"status": 404}, {}, "it may be late"),
    "somebody else was faster": ("commit", {"status": 412}, {}, "somebody else"),
}


def test_what_can_pass_is_tried_again(run: Path, tmp_path: Path):
    """All at once: most of their time they wait."""
    with contextlib.ExitStack() as stack:
        started = []
        for name, (endpoint, fault, env, _) in PASSING.items():
            hub = stack.enter_context(serving(tmp_path / name))
            hub.fail(endpoint, **fault)
            own = shutil.copytree(run, tmp_path / name / "run")
            started.append((name, hub, start(hub, "push", str(own), REPO, **env)))
        for name, hub, process in started:
            done, (_, fault, _, said) = Done(process), PASSING[name]
            assert (done.status, done.message, hub.commits(REPO)) == (0, "", 1), name
            assert said in done.out and done.out.count("next try in") == (fault.get("times", 1) if said else 0), name
            assert "next try in 1.0 s" in done.out or "headers" not in fault, name
            assert hub.files(REPO).keys() - {".gitattributes"} == PUSHED, name
            assert done.revision == hub.repos[REPO].head, name


WHY = {"error": "the metadata of README.md are wrong: " + "a long explanation, " * 20 + "which ends here"}
LASTING = {
    "503 for ever": ("commit", {"times": FOREVER}, ["has a problem (503)"], 5),
    "connection cut for ever": ("commit", {"kind": "cut", "times": FOREVER}, ["cannot be reached"], 5),
    "an hour to wait": ("preupload", {"status": 429, "headers": {"Retry-After": "3600"}}, ["rate limit", "3600 s"], 1),
    "token revoked meanwhile": ("preupload", {"status": 401, "times": FOREVER}, ["does not know this token"], 1),
    "repo gone": ("preupload", {"status": 404, "times": FOREVER}, ["sees no such repo", "deleted or renamed"], 1),
    "something else": ("commit", {"status": 400, "times": FOREVER, "body": WHY}, ["the Hub refuses", WHY["error"]], 1),
    "no Hub at all": ("info", {"status": 200, "times": FOREVER, "body": {"hello": 1}}, ["is no Hub", "HF_ENDPOINT"], 1),
    "the storage refuses": ("blob", {"status": 403, "times": FOREVER}, ["storage of large files", "expired"], 5),
    "write permission gone": ("xet_token", {"status": 403, "times": FOREVER}, ["refuses (403)", "'ann'", "'write'"], 1),
}


def test_a_push_that_fails_loses_nothing(run: Path, tmp_path: Path):
    """All at once, as above."""
    with contextlib.ExitStack() as stack:
        started = []
        for name, (endpoint, fault, *_) in LASTING.items():
            hub = stack.enter_context(serving(tmp_path / name))
            hub.fail(endpoint, **fault)
            own = Path(shutil.copytree(run, tmp_path / name / "run"))
            process = start(hub, "push", str(own), REPO, **(LFS if endpoint == "blob" else {}))
            started.append((name, hub, own, process))
        for name, hub, own, process in started:
            done, (endpoint, _, said, tries) = Done(process), LASTING[name]
            assert done.status == 1 and done.command == ["atlas", "push", str(own), REPO], name
            for part in [*said, f"The adapter is safe in {own}"]:
                assert part in done.message, name
            assert hub.count(endpoint) == tries and hub.commits(REPO) == 0, name
            # The card names the repo now. Everything else is as it was.
            now, before = contents(own), contents(run)
            assert now.pop("README.md") != before.pop("README.md") and now == before, name
            assert not (own / "push.json").exists(), name

        # The folder is taken to another machine, and the printed command is run there with its new place.
        hub.faults.clear()
        elsewhere = own.rename(tmp_path / "elsewhere")
        finished = atlas(hub, "push", str(elsewhere), REPO, HF_HOME=str(tmp_path / "other home"))
        assert finished.status == 0 and hub.commits(REPO) == 1
        assert hub.files(REPO).keys() - {".gitattributes"} == PUSHED


# What can be known before training: the fault, the token, the repo, the exit status, and what is said.
REFUSED: dict[str, tuple[str | None, str, int, list[str]]] = {
    "no token": (None, REPO, 2, ["no Hub token", "hf auth login", "HF_TOKEN"]),
    "wrong token": (WRONG, REPO, 2, ["does not know this token (401)", "hf auth login"]),
    "garbled token": ("hf_\u201cquoted\u201d", REPO, 2, ["a character that no token has", "hf auth login"]),
    "read-only token": (READ, "ann/there", 2, ["'ann'", "role 'read'", "huggingface.co/settings/tokens"]),
    "other namespace": (WRITE, "bob/tuned", 2, ["'ann' may not write to the namespace 'bob'", "Their own: ann"]),
    "somebody's repo": (WRITE, "bob/there", 2, ["'ann' may not write to the namespace 'bob'"]),
}


def with_repos(hub: HubServer) -> HubServer:
    """There is one repo of ann's and a public one of bob's."""
    hub.make_repo("ann/there", private=True)
    hub.make_repo("bob/there", private=False)
    return hub


@pytest.mark.parametrize("name", REFUSED)
def test_push_says_what_is_wrong_with_the_access(name: str, hub: HubServer, run: Path):
    token, repo, status, said = REFUSED[name]
    done = atlas(with_repos(hub), "push", str(run), repo, token=token)
    assert done.status == status
    for part in [*said, str(run)]:
        assert part in done.message
    assert done.command == ["atlas", "push", str(run), repo]
    assert hub.count("preupload") == 0 and not (token and token in done.out + done.message)


@pytest.mark.parametrize("repo", ["tuned", "ann/two words", "ann/too/many"])
def test_what_is_no_repo_name_is_refused(repo: str, hub: HubServer, run: Path):
    done = atlas(hub, "push", str(run), repo)
    assert done.status == 2 and f"{repo!r} is not a repo's name: write it as namespace/name" in done.message
    assert hub.log == []


def test_push_without_network_or_in_offline_mode(hub: HubServer, run: Path):
    offline = atlas(hub, "push", str(run), REPO, HF_HUB_OFFLINE="1")
    assert offline.status == 2 and "HF_HUB_OFFLINE is set" in offline.message and hub.log == []
    hub.__exit__()
    gone = atlas(hub, "push", str(run), REPO)
    assert gone.status == 1 and "the Hub cannot be reached (ConnectError" in gone.message
    assert gone.out.count("next try in") == 2 and gone.command == ["atlas", "push", str(run), REPO]


def test_a_push_that_is_told_to_stop_says_how_to_finish_it(hub: HubServer, run: Path):
    hub.fail("commit", times=FOREVER)
    started = start(hub, "push", str(run), REPO, ATLAS_RETRY_SECONDS="60")
    started.wait_for("next try in 60.0 s")
    done = Done(started, signal.SIGTERM)
    assert done.status == 143 and "the push was stopped" in done.message
    assert f"atlas push {shlex.quote(str(run))} {REPO}" in done.message


@pytest.mark.parametrize("seconds", ["nan", "-1", "inf", "soon", ""])
def test_seconds_that_are_none(seconds: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setenv("ATLAS_RETRY_SECONDS", seconds)
    assert push.main([str(run), REPO]) == 2
    assert f"ATLAS_RETRY_SECONDS={seconds!r} is not a number of seconds" in capsys.readouterr().err


def test_what_was_pulled_is_there_offline_by_the_same_name(hub: HubServer, run: Path, tmp_path: Path):
    revision = atlas(hub, "push", str(run), REPO).revision
    atlas(hub, "pull", REPO, "--to", "first")
    for number, name in enumerate((REPO, f"{REPO}@main", f"{REPO}@{revision}")):
        again = atlas(hub, "pull", name, "--to", f"again {number}", HF_HUB_OFFLINE="1")
        assert (again.status, again.message) == (0, "") and again.revision == revision, name
    assert contents(hub.store.parent / "again 0") == contents(hub.store.parent / "first")


def test_a_damaged_adapter_is_not_pushed(hub: HubServer, run: Path):
    path = run / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:4000])
    done = atlas(hub, "push", str(run), REPO)
    assert done.status == 2 and "is damaged" in done.message and hub.log == []
    with pytest.raises(UserError, match="is damaged"):  # as a run does at its end
        push.push(run, REPO, access_checked=True)


TRAIN = """
import json, os, sys
from atlas.train import sft
for token, repo in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    status = sft.main([*sys.argv[2:], f"output.hub_repo={repo}"])
    print(f"exit status {status}", flush=True)
    print("----", file=sys.stderr, flush=True)
"""


def test_training_does_not_start_where_the_push_could_not_end_well(hub: HubServer, sft_args: list[str], tmp_path: Path):
    cases = [*((token, repo) for token, repo, _, _ in REFUSED.values()), (WRITE, REPO)]
    hub.fail("commit", "lose")
    known = start(with_repos(hub), "-c", TRAIN, json.dumps(cases), *sft_args)
    away = ["output.dir=nobody", f"output.hub_repo={REPO}"]
    nobody = atlas(hub, "sft", *sft_args, *away, HF_ENDPOINT="http://127.0.0.1:9")
    assert nobody.status == 1 and "step " not in nobody.out and not (hub.store.parent / "nobody").exists()
    assert "the Hub cannot be reached" in nobody.message and "--no-push-to-hub" in nobody.message

    done = Done(known)
    out, messages = done.out, done.message
    *refused, last = out.split("exit status ")[:-1]
    for (_, repo, _, said), message, text in zip(REFUSED.values(), messages.split("----\n"), refused, strict=False):
        assert "Traceback" not in message and message.count("error: ") == 1
        for part in [f"output.hub_repo: '{repo}'", *said, "--no-push-to-hub"]:
            assert part in message
        assert "step " not in text
    assert re.findall(r"exit status (\d)", out) == ["2"] * len(REFUSED) + ["0"]
    # The last one may: it trains, and the answer to its commit is lost.
    assert "step 3/3" in last and f"{REPO} holds these files already, revision {hub.repos[REPO].head}" in last
    assert hub.commits(REPO) == 1 and (tmp_path / "out" / "push.json").is_file()


def test_a_run_whose_push_fails_is_finished_later_and_leaves_no_token_anywhere(
    hub: HubServer, sft_args: list[str], tmp_path: Path
):
    hub.fail("commit", times=FOREVER)
    more = ["train.save_strategy=steps", "train.save_steps=2", f"output.hub_repo={REPO}"]
    done = atlas(hub, "sft", *sft_args, *more, WANDB_API_KEY=WANDB)
    folder = tmp_path / "out"
    assert done.status == 1 and f"The adapter is safe in {folder}" in done.message and hub.commits(REPO) == 0
    hub.faults.clear()
    finished = atlas(hub, *done.command[1:])
    assert finished.status == 0 and hub.commits(REPO) == 1 and finished.revision == hub.repos[REPO].head

    scanned = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert folder / "checkpoint-2" / "training_args.bin" in scanned and folder / "push.json" in scanned
    for secret in (WRITE, WANDB):
        assert [path for path in scanned if secret.encode() in path.read_bytes()] == []
        assert secret not in done.out + done.message + finished.out


LOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from atlas.models.adapters import find_adapter
from atlas.models.load import load_model
from atlas.models.merge import merge
base, text, out, plain, *pinned = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), plain).eval()
loaded = [(model, AutoTokenizer.from_pretrained(plain))]
for name in pinned:
    loaded.append(load_model(base, find_adapter(name), dtype=torch.float32))
with torch.no_grad():
    torch.save([model(**tokenizer(text, return_tensors="pt")).logits for model, tokenizer in loaded], out)
merge(pinned[0], Path(out).with_name("merged"))
"""


SCORE = """
import json, sys
from atlas.eval import run
for name, adapter in json.loads(sys.argv[1]).items():
    if run.main([*sys.argv[2:], "--adapter", adapter, "--name", name]):
        sys.exit(1)
"""


def test_loaded_by_repo_id_in_another_process_the_logits_are_the_same(
    hub: HubServer, trained_run: TrainedRun, run: Path, lab: PocketPaths, tmp_path: Path
):
    atlas(hub, "push", str(run), "ann/lfs", **LFS)
    first = atlas(hub, "push", str(run), "ann/xet").revision
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    scale = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(scale | {"lora_alpha": 2 * scale["lora_alpha"]}))
    second = atlas(hub, "push", str(changed), "ann/xet").revision
    assert first != second == hub.repos["ann/xet"].head

    names = ["ann/lfs", f"ann/xet@{first}", f"ann/xet@{second}", "ann/xet"]
    done = atlas(hub, "-c", LOAD, str(trained_run.base), trained_run.text, str(tmp_path / "logits.pt"), *names)
    assert done.status == 0, done.message
    lfs, xet, pinned, newest = torch.load(tmp_path / "logits.pt")
    assert torch.equal(lfs, trained_run.logits) and torch.equal(xet, trained_run.logits)
    assert torch.equal(pinned, newest) and (pinned - xet).abs().max() > 1e-3
    merged = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (merged["adapter"], merged["adapter_revision"]) == (f"ann/xet@{first}", first)
    assert merged["relative_difference"]["merged"] < 1e-5

    # lm-eval scores what came back from the Hub as it scores the folder; the other revision answers otherwise.
    asked = ["--config", str(ROOT / "configs" / "sft_pocket.yaml"), f"model.name={trained_run.base}", "--limit", "3"]
    asked += [
        f"eval.data.ifeval={lab.eval}",
        "eval.tasks=[{name: ifeval, max_gen_toks: 8}]",
        "quantization.load_in_4bit=false",
    ]
    asked += [f"output.results_dir={tmp_path}"]
    adapters = {"folder": str(run), "first": f"ann/xet@{first}", "newest": "ann/xet"}
    scored = atlas(hub, "-c", SCORE, json.dumps(adapters), *asked)
    assert scored.status == 0, scored.message
    replies = {name: (tmp_path / "eval" / name / "ifeval.jsonl").read_text() for name in adapters}
    assert replies["folder"] == replies["first"] != replies["newest"]
    rows = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert [row["adapter_revision"] for row in rows] == [None, first, second]


def test_pull_gives_the_revision_back(hub: HubServer, run: Path, tmp_path: Path):
    first = atlas(hub, "push", str(run), REPO).revision
    original = contents(run)
    (run / "chat_template.jinja").write_text("{{ messages }}")
    second = atlas(hub, "push", str(run), REPO).revision

    done = atlas(hub, "pull", f"{REPO}@{first}", "--to", str(tmp_path / "old"))
    assert done.status == 0 and done.revision == first and str(tmp_path / "old") in done.out
    old = contents(tmp_path / "old")
    assert old.keys() == PUSHED and all(old[name] == original[name] for name in PUSHED)
    assert not any(path.is_symlink() for path in (tmp_path / "old").iterdir())

    newest = atlas(hub, "pull", REPO)
    assert newest.revision == second and (hub.store.parent / "outputs" / "tuned" / "manifest.json").is_file()
    # What was pulled is whole: pushing it is a push of nothing.
    assert "no new commit" in atlas(hub, "push", str(hub.store.parent / "outputs" / "tuned"), REPO).out

    for arguments, status, part in (
        ([REPO, "--to", str(tmp_path / "old")], 2, "nothing is overwritten"),
        ([f"{REPO}@{'0' * 40}", "--to", "new"], 2, "no such repo or revision"),
        ([f"{REPO}@", "--to", "new"], 2, "namespace/name@revision"),
        (["ann/nothing", "--to", "new"], 2, "no such repo or revision"),
    ):
        refused = atlas(hub, "pull", *arguments)
        assert refused.status == status and part in refused.message
    assert contents(tmp_path / "old") == old
    anonymous = atlas(hub, "pull", REPO, "--to", "new", token=None)
    assert anonymous.status == 2 and "private or does not exist" in anonymous.message
    assert not (hub.store.parent / "new").exists()


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json"])
def test_a_file_with_a_token_is_not_pushed(name: str, hub: HubServer, run: Path):
    with (run / name).open("a") as file:
        file.write(f"my token is {BOB}\n")
    done = atlas(hub, "push", str(run), REPO)
    assert done.status == 2 and hub.commits(REPO) == 0
    assert f"{run / name} holds what looks like a Hugging Face token" in done.message and BOB not in done.message


def test_the_value_of_a_secret_variable_is_not_pushed(hub: HubServer, run: Path):
    (run / "chat_template.jinja").write_text("{# correct horse battery #}")
    done = atlas(hub, "push", str(run), REPO, TRACKER_API_KEY="correct horse battery")
    assert done.status == 2 and "the value of TRACKER_API_KEY" in done.message and "correct horse" not in done.message


def test_a_folder_without_a_run_is_refused(hub: HubServer, run: Path):
    (run / "adapter_model.safetensors").unlink()
    done = atlas(hub, "push", str(run), REPO)
    assert done.status == 2 and "adapter_model.safetensors missing" in done.message and hub.log == []
