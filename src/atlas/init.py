"""`atlas init`: a commented config to begin with."""

from argparse import Namespace

from atlas.cli import command
from atlas.config import packaged_configs
from atlas.errors import DONE, UserError

OWN_DATA = "own_data.yaml"


@command("init")
def main(arguments: Namespace) -> int:
    folder, like = arguments.folder, arguments.like
    brought = sorted(path.name for path in packaged_configs().glob("*.yaml"))
    if like not in brought:
        raise UserError(f"--like {like}: atlas brings along {', '.join(brought)}")
    path = folder / ("sft.yaml" if like == OWN_DATA else like)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write((packaged_configs() / like).read_text(encoding="utf-8"))
    except FileExistsError as error:
        there = error.filename or path
        raise UserError(f"{there} exists already, and nothing is overwritten: name another folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    print(f"{path} is written. Put the names of your data and your model in it, then run `atlas audit --config {path}`")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
