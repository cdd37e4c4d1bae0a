"""`atlas init`: a commented config to begin with, or the file of a job."""

from argparse import Namespace

from atlas.cli import command
from atlas.config import packaged_configs
from atlas.config.load import read_yaml
from atlas.errors import DONE, UserError

OWN_DATA = "own_data.yaml"
JOBS = {"slurm.sbatch": "sbatch", "kubernetes.yaml": "kubectl apply -f"}
"""What starts several machines, and the command that takes it."""


@command("init")
def main(arguments: Namespace) -> int:
    folder, like = arguments.folder, arguments.like
    brought = sorted(path.name for path in packaged_configs().glob("*.yaml"))
    if like not in (*brought, *JOBS):
        raise UserError(f"--like {like}: atlas brings along {', '.join((*brought, *JOBS))}")
    path = folder / ("sft.yaml" if like == OWN_DATA else like)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write((packaged_configs() / ("launch" if like in JOBS else "") / like).read_text(encoding="utf-8"))
    except FileExistsError as error:
        there = error.filename or path
        raise UserError(f"{there} exists already, and nothing is overwritten: name another folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    if like in JOBS:
        print(f"{path} is written. Change the lines with SET, then `{JOBS[like]} {path}`")
        return DONE
    if "stages" in read_yaml(path):
        print(f"{path} is written. Put the names of your stages' configs in it, then run `atlas run --config {path}`")
        return DONE
    print(f"{path} is written. Put the names of your data and your model in it, then run `atlas audit --config {path}`")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
