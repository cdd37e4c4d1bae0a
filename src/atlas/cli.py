"""`atlas COMMAND ...`: the entry points as subcommands; each module is imported only when it is asked for."""

import sys
from importlib import import_module

COMMANDS = {
    "init": ("atlas.init", "a commented config for your own data"),
    "sft": ("atlas.train.sft", "supervised fine-tuning: config -> adapter"),
    "preflight": ("atlas.train.preflight", "everything that would end a run badly, in seconds, before it starts"),
    "data": ("atlas.data.report", "what a config would train on: rows used, cut, dropped; lengths; held-out rows"),
    "audit": ("atlas.audit.command", "what would be trained, token by token; compare two audits"),
    "eval": ("atlas.eval.run", "score base, adapter or merged model with lm-eval; every reply is kept"),
    "compare": ("atlas.eval.compare", "is one run better than another on the same prompts, or is it luck?"),
    "generate": ("atlas.eval.generate", "one reply of a tuned model"),
    "chat": ("atlas.eval.generate:main_chat", "talk with a tuned model"),
    "push": ("atlas.hub.push", "push a finished run to the Hub"),
    "pull": ("atlas.hub.pull", "get an adapter from the Hub, at a pinned revision"),
    "merge": ("atlas.models.merge", "an adapter and its base as one model"),
    "pocket": ("atlas.pocket.lab", "the whole way on a machine with neither GPU nor Hub"),
}


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: atlas COMMAND [arguments]\n")
        print("\n".join(f"  {name:<9} {what}" for name, (_, what) in COMMANDS.items()))
        print("\n`atlas COMMAND --help` shows the arguments of one.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from atlas import __version__

        print(f"atlas {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0)[0]
        print(f"error: unknown command {arguments[0]!r}; did you mean {near!r}?", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[arguments[0]][0].partition(":")
    status: int = getattr(import_module(module), function or "main")(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
