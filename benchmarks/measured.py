"""Where a measurement goes: outputs/figures/NAME.json. `make figures` takes it over into figures/, which is committed."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MEASURED = Path("outputs/figures")


def stamp(command: str) -> dict[str, Any]:
    """What every measurement carries: hardware, versions, date, command."""
    from atlas.compat import versions
    from atlas.device import Machine

    return {
        "hardware": Machine.without_torch().cpu,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def record(name: str, report: dict[str, Any], command: str) -> dict[str, Any]:
    """Write `report` with its stamp."""
    from atlas.files import write_json

    path = MEASURED / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = report | stamp(command)
    write_json(path, stamped)
    print(f"written: {path}")
    return stamped


def this_command() -> str:
    """The command that runs now, as it would be typed."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def record_benchmark(name: str, entry: dict[str, Any], command: str, show: bool = True) -> None:
    """Put `entry` beside the other benchmarks, and print it."""
    from atlas.files import write_json

    path = MEASURED / "benchmarks.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, known | {name: entry | stamp(command)})
    if show:
        print(json.dumps(entry, indent=1))
