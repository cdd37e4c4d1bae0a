"""This process among those of one launch: torchrun and accelerate tell each its number and how many there are."""

import os
import shlex
import sys
from pathlib import Path

from atlas.redact import redact

IDLE_BELOW = 20
"""Percent of all cores that other processes may take on a machine that counts as idle."""


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """The first process of a launch: the one that speaks, saves and pushes."""
    return rank() == 0


def processes() -> int:
    """How many processes this launch has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def lone() -> str | None:
    """Who was told to start several processes, and has started this one without telling it of the others; None: nobody, as far as
    that is certain.

    `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15). accelerate sets MASTER_PORT only for more
    than one, so that it was told so if it does not have that variable itself. `mpirun` tells in variables of its own.
    """
    if "WORLD_SIZE" in os.environ:
        return None
    for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "1") != "1":
            return f"mpirun ({name}={os.environ[name]})"
    if not {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        return None
    import psutil

    try:
        parent = psutil.Process().parent()
        return "accelerate launch" if parent and "MASTER_PORT" not in parent.environ() else None
    except psutil.Error:
        return None


def set_up_torch() -> None:
    """What is read once, when torch is imported: how OpenMP's threads wait for each other, and how tensors get their memory. What
    the environment says already stays. Prints the former.

    Threads that stay awake for some microseconds trained the pocket lab 1.5 times faster on two idle cores. Beside other busy
    processes they were up to 4 times slower, and without a limit small steps are 6-13 times slower.

    Large tensors get whole pages of 2 MiB (torch's own setting). glibc's heap keeps fewer free pieces between them: a run of the
    0.5B shape held 4.1 GiB instead of 6.3 at the same speed.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    import psutil

    busy = psutil.cpu_percent(interval=0.2)
    if busy < IDLE_BELOW and processes() == 1:
        os.environ["GOMP_SPINCOUNT"] = "10000"
    else:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if is_main_process():
        how = "stay awake between operations" if "GOMP_SPINCOUNT" in os.environ else "sleep between operations"
        print(f"threads of the CPU {how}: other processes take {busy:.0f} % of it (OMP_WAIT_POLICY, GOMP_SPINCOUNT)")


def command_line() -> str:
    """What was typed: `python -m MODULE ...` or the script's name, with its arguments; tokens as `***`. Of a process of several:
    a command that starts as many. In a notebook nothing was typed."""
    if Path(sys.argv[0]).name.endswith("kernel_launcher.py"):  # ipykernel's, and Colab's
        return "in a notebook"
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]
    here, nodes = local_processes(), processes() // local_processes()
    if processes() == 1:
        program = ["python", *program] if spec is not None else program
    elif program[-1] in ("atlas.cli", "atlas"):
        program = ["atlas", "launch", *_on(nodes, "--nodes", "--master"), "--nproc", str(here), "--"]
    else:
        program = ["torchrun", *_on(nodes, "--nnodes", "--rdzv_endpoint"), "--nproc_per_node", str(here), *program]
    return shlex.join([*program, *map(redact, sys.argv[1:])])


def _on(nodes: int, how_many: str, meet_at: str) -> list[str]:
    return [how_many, str(nodes), meet_at, "HOST:PORT"] if nodes > 1 else []
