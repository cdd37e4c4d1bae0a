"""`atlas launch`: a command of atlas on several processes, on one machine or on several, by torch's own launcher.

    atlas launch --nproc 2 -- sft --config configs/sft_qwen05b.yaml
    atlas launch --nodes 2 --master node0:29500 -- sft --config configs/sft_qwen05b.yaml      the same line on each machine

`torchrun -m atlas.train.sft ...` and `accelerate launch -m atlas.train.sft ...` start the same run. This one counts the GPUs,
shares the cores, names the process that died and why, leaves time to save after SIGTERM, and ends with the command's exit status.
"""

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from argparse import Namespace
from datetime import timedelta
from typing import TYPE_CHECKING

from atlas.cli import command, parse
from atlas.config import SCHEMAS
from atlas.errors import DONE, FAILED, RunError, UserError, first_line
from atlas.launch import processes

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SECONDS_TO_SAVE = 120
"""That the processes have after SIGTERM for the current step and its checkpoint, before SIGKILL. The environment variable
TORCH_ELASTIC_SHUTDOWN_TIMEOUT is another number."""
SECONDS_TO_MEET = 900
"""That machines wait for each other."""
SECONDS_TO_ANSWER = 5


@command("launch")
def main(arguments: Namespace) -> int:
    words = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    name, *rest = words or [""]
    if name not in SCHEMAS:
        raise UserError(f"atlas launch: after `--` comes a training command ({', '.join(SCHEMAS)}), not {name!r}")
    if processes() > 1:
        raise UserError("atlas launch: this is a process of a launch already (WORLD_SIZE is set): use one launcher")
    parse(name, rest)  # its wrong arguments end here, once
    if arguments.nodes > 1 and arguments.master is None:
        raise UserError("atlas launch: --nodes needs --master HOST:PORT, the same on each machine")
    logging.disable()  # torch's launcher: what it says is said below, in one line
    count = arguments.nproc or _gpus() or 1
    if arguments.master is not None:
        _look_at(arguments.master, arguments.nodes)
    return _launch(count, arguments.nodes, arguments.master, words)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _look_at(master: str, nodes: int) -> None:
    """Raises `UserError` where the machines cannot meet there, as far as this one can tell."""
    host, _, port = master.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"atlas launch: --master {master}: write HOST:PORT, e.g. node0:29500")
    try:
        socket.create_server((host, 0)).close()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # another machine's address
            return
        raise UserError(f"atlas launch: --master {master}: {_short(error)}: is the name right?") from None
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        if nodes == 1 or not _is_a_meeting(host, int(port)):
            raise UserError(
                f"atlas launch: --master {master}: the port cannot be used ({_short(error)}): choose another one"
                + ("; one machine alone needs no --master" if nodes == 1 else "")
            ) from None


def _short(error: OSError) -> str:
    return str(error.strerror).partition(" (while")[0]


def _is_a_meeting(host: str, port: int) -> bool:
    """Does a launcher of this launch wait there already? A program that says nothing would hold up torch 2.13 for ever."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    found = []

    def look() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SECONDS_TO_ANSWER)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_ANSWER)
    return bool(found)


def _launch(count: int, nodes: int, master: str | None, words: list[str]) -> int:
    """Start the processes and wait for them. Returns their exit status; raises `UserError` where they cannot meet."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    where, threads = "this machine", os.environ["OMP_NUM_THREADS"]
    if nodes > 1:
        where = f"each of {nodes} machines, which meet at {master} (they wait {SECONDS_TO_MEET // 60} minutes for each other)"
    print(f"launch: {count} processes on {where}, threads of each on the CPU: {threads}", flush=True)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    stops = ["SIGTERM", "SIGINT", "SIGQUIT"]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else `nohup`: the session may end, and the run goes on
        stops.append("SIGHUP")
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=count,
        run_id="atlas",
        rdzv_backend="c10d",
        rdzv_endpoint=master or "localhost:0",
        rdzv_configs={"timeout": SECONDS_TO_MEET, "read_timeout": SECONDS_TO_MEET},
        max_restarts=0,
        signals_to_handle=",".join(stops),
        shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "atlas.cli", *words)
    except ChildFailedError as error:
        return _failed(error, count * nodes)
    except SignalException as error:
        # The processes have saved and said so, or have been killed after the time that they had.
        return 128 + int(error.sigval)
    except RendezvousError as error:
        raise RunError(
            f"atlas launch: the launcher at {master} cannot be reached, or has ended ({first_line(error)}). Look at what it says "
            f"there. Was the same line started on each of {nodes} machines within {SECONDS_TO_MEET // 60} minutes, and can all of "
            "them reach that port?"
        ) from None
    return DONE


def _failed(error: "ChildFailedError", count: int) -> int:
    """The exit status of the process that failed first, after a message where it could give none by itself."""
    number, failure = error.get_first_failure()
    if failure.exitcode >= 0:  # it has said why
        return failure.exitcode or FAILED
    name = signal.Signals(-failure.exitcode).name
    why = {
        "SIGKILL": " (the system does that when memory runs out)",
        "SIGABRT": " (NCCL does that when another process has not answered for train.ddp_timeout seconds: its lines above name the "
        "operation and the process)",
    }
    raise RunError(
        f"process {number} of {count} (pid {failure.pid} on {socket.gethostname()}) was ended by {name}{why.get(name, '')}; the "
        "others were stopped. The last checkpoint stays: the same command resumes"
    )
