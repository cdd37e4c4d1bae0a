"""The pocket lab's pairs: the better reply does what was asked, the worse one does not, and length does not tell which is which."""

import json
from pathlib import Path

from atlas.pocket import base, pairs, world


def test_pairs_differ_in_an_instruction_or_in_where_they_stop_and_not_in_length() -> None:
    from lm_eval.tasks.ifeval import utils

    trained = {turn.prompt for _, turns in world.dialogues(0, 400) for turn in turns}
    made = [pairs.pairs(seed, 500, trained, lambda text: len(text) // 3) for seed in (0, 0, 1)]  # about a token
    rows = made[0]
    assert rows == made[1] != made[2]
    prompts = {row["prompt"] for row in rows}
    held_out = {row["prompt"] for row in world.heldout_prompts(0, 600)}
    assert len(prompts) == 500 and not prompts & trained and not prompts & held_out
    rambling = 0
    for row in rows:
        wanted = _asked(row["prompt"])
        followed = {}
        for side in ("chosen", "rejected"):
            example = utils.InputExample(0, list(wanted), row["prompt"], list(wanted.values()))
            followed[side] = utils.test_instruction_following_strict(example, row[side]).follow_all_instructions
        assert followed["chosen"], row
        goes_on = row["rejected"].startswith(row["chosen"])
        rambling += goes_on
        assert goes_on or not followed["rejected"], row
    assert 0.2 < rambling / 500 < 0.5
    chosen, rejected = (sum(len(row[side]) // 3 for row in rows) for side in ("chosen", "rejected"))
    assert abs(chosen / rejected - 1) < 0.05
    apart = [len(row["chosen"]) // 3 - len(row["rejected"]) // 3 for row in rows]
    assert abs(sum(each > 0 for each in apart) - sum(each < 0 for each in apart)) < 15


def _asked(prompt: str) -> dict[str, dict[str, object]]:
    """The instructions of a prompt with their arguments, read from its words."""
    asked: dict[str, dict[str, object]] = {}
    for name, wordings in world.REQUESTS.items():
        arguments = {world.END: world.END_PHRASES, world.BULLETS: ("2", "3", "4")}.get(name, ("",))
        for argument in arguments:
            if any(wording.format(argument) in prompt for wording in wordings):
                asked[name] = {
                    world.END: {"end_phrase": argument},
                    world.BULLETS: {"num_bullets": int(argument) if argument.isdigit() else 0},
                    world.POSTSCRIPT: {"postscript_marker": "P.S."},
                    world.HIGHLIGHT: {"num_highlights": 1},
                }.get(name, {})
    return asked


def test_the_lab_writes_pairs_in_tokens_and_prompts_that_begin_with_its_own(
    lab: base.PocketPaths, tmp_path: Path
) -> None:
    pairs.write(lab, tmp_path, 0)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == pairs.PAIRS and set(rows[0]) == {"prompt", "chosen", "rejected"}
    prompts = (tmp_path / "prompts.jsonl").read_text()
    assert prompts.startswith(lab.eval.read_text()) and len(prompts.splitlines()) == pairs.PROMPTS
