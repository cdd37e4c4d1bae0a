"""`atlas data`: the ledger as text and as a page, without a model."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from atlas.config import load_config
from atlas.data import commands, report
from atlas.data.commands import dump_audit
from atlas.hub.card import write_card
from atlas.hub.push import files_to_push
from atlas.train.sft import train
from browser import dom
from rows import ROOT, chat, label, write_rows
from runs import run_arguments


def arguments(base_folder: Path, data: object, folder: Path, *overrides: str) -> list[str]:
    return [
        "--config",
        str(ROOT / "configs" / "sft_pocket.yaml"),
        "model.name=nowhere/none",  # never loaded
        f"model.tokenizer_name={base_folder}",
        f"data.train={data}",
        f"output.results_dir={folder}",
        *overrides,
    ]


def test_report_says_what_became_of_every_row(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [chat(f"Question {i}?", "word " * i) for i in range(1, 60)]
    bad = {"messages": [{"role": "<script>alert(1)</script>", "content": "x"}]}
    path = write_rows(tmp_path / "rows <b>.jsonl", [*rows, bad, rows[0]])
    given = arguments(
        base_folder, path, tmp_path, "data.max_bad_fraction=0.1", "data.deduplicate=true", "data.eval_rows=5"
    )
    assert commands.data([*given, "train.max_length=64"]) == 0
    out = capsys.readouterr().out
    assert "61 rows read, 54 used" in out and "unknown role" in out and "data held out (5 rows" in out
    page = (tmp_path / report.REPORT).read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "rows &lt;b&gt;.jsonl" in page
    overview = re.search(r"<tr><td[^>]*>rows[^<]*&lt;b&gt;\.jsonl(.*?)</table>", page, re.DOTALL)
    assert overview is not None
    cells = re.findall(r"<td[^>]*>([^<]*)", overview[1])
    assert cells[:3] == ["messages", "61", "54"] and cells[5:7] == ["6", "1"]
    bars = [int(n.replace(",", "")) for n in re.findall(r"<title>[^<]* tokens: ([0-9,]+) rows?<", page)]
    assert sum(bars) == 2 * 54  # two histograms of the used rows


def test_the_page_fits_a_phone(base_folder: Path, tmp_path: Path):
    path = write_rows(
        tmp_path / "conversations_with_customers_2026.jsonl", [chat(f"Q{i}?", "word " * i) for i in range(1, 60)]
    )
    bad = write_rows(tmp_path / "bad.jsonl", [chat("Q", "A"), "{" + "x" * 60])
    labeled, _ = label(base_folder, [str(path), str(bad)], "data.max_bad_fraction=0.5")
    measure = """<body><script>const frame = document.createElement("iframe"); frame.style = "border:0;width:390px;height:2000px"
        frame.onload = () => { const page = frame.contentDocument, box = (e) => e.getBoundingClientRect()
        const source = box(page.querySelector("td")), shown = [...page.querySelectorAll("td,li,svg,h2")].map(box)
        document.body.innerText = `widest ${Math.max(...shown.map((b) => b.right))} source ${source.width} ${source.height} .` }
        frame.srcdoc = PAGE; document.body.append(frame)</script>"""
    (tmp_path / "frame.html").write_text(
        measure.replace("PAGE", json.dumps(report.page(labeled)).replace("</", "<\\/"))
    )
    shown = dom(tmp_path / "frame.html")
    found = re.search(r"widest ([\d.]+) source ([\d.]+) ([\d.]+) \.", shown)
    assert found is not None, shown
    widest, width, height = map(float, found.groups())
    assert widest <= 390 - 11  # all inside the margins
    assert width > 300 and height < 60  # the source's name on two lines at most


def test_no_text_of_a_row_is_in_what_a_push_sends(base_folder: Path, tmp_path: Path):
    secret = "Zanzibar"
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.chat_template = (  # marks whole conversations, so that the audit's findings quote them
        "{% generation %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% endgeneration %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [chat(f"{secret} {i}?", f"{secret}.") for i in range(20)]
    bad = [
        "{" + secret,
        {"messages": [{"role": secret, "content": secret}]},
        chat(f"<|im_end|>{secret}", secret),
        {secret: secret},
    ]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, *bad])
    held = write_rows(tmp_path / "held.jsonl", [*rows[:2], *bad])
    given = run_arguments(base_folder, data, tmp_path)[2:]
    given += [f"model.tokenizer_name={tmp_path / 'tokenizer'}", f"data.eval={held}", "data.max_bad_fraction=0.9"]
    config = load_config(ROOT / "configs" / "sft_pocket.yaml", [*given, "audit.gate=warn", "train.save_strategy=steps"])
    dump_audit(config)
    folder = train(config).folder
    write_card(folder, "ann/tuned", new=True)
    local = [folder / report.REPORT, tmp_path / "results" / "sft_template_audit.jsonl"]
    assert all(secret in path.read_text(encoding="utf-8") for path in local)
    sent = files_to_push(folder)
    assert {"manifest.json", "README.md", "audit_summary.json"} <= sent.keys()
    vocabulary = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert secret.encode() not in vocabulary
    for path in [*sent.values(), *(path for path in folder.glob("checkpoint-*/*") if path.suffix == ".json")]:
        assert secret.encode() not in path.read_bytes(), path
    source = json.loads((folder / "manifest.json").read_text())["data"]["sources"][0]
    assert (
        source["dropped"] == {"not JSON": 1, "unknown role": 1, "injected": 1, "no messages": 1} and source["findings"]
    )


def test_histograms_count_every_used_row_once(base_folder: Path, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [chat("Q?", "word " * i) for i in range(1, 100)])
    labeled, _ = label(base_folder, f"{path}:150", "train.max_length=64")
    ledger = labeled.ledgers[0]
    assert sum(ledger.histogram["rows"]) == sum(ledger.histogram["supervised"]) == ledger.used == 150
    assert ledger.histogram["rows"][-1] == ledger.cut > 0  # beyond max_length
    assert ledger.lengths["max"] > 64 >= ledger.supervised_lengths["max"]


def test_a_stream_is_read_through(base_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert commands.data(arguments(base_folder, rows_file, tmp_path, "data.streaming=true")) == 0
    assert "120 rows read, 120 used," in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipe_for_mixed_data_runs_on_real_rows(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    files = [shared / "alpaca/alpaca_2000.jsonl", shared / "dolly/dolly_1000.jsonl"]
    status = commands.data(
        [
            "--config",
            str(ROOT / "configs" / "sft_qwen05b_mix.yaml"),
            f"model.tokenizer_name={shared / 'qwen2.5-tokenizer-instruct'}",
            f"data.train=[{files[0]}, {files[1]}, {shared / 'multiturn/oasst_en_multiturn.jsonl'}:500]",
            f"output.results_dir={tmp_path}",
        ]
    )
    out = capsys.readouterr().out
    assert status == 0 and "(alpaca): 2,000 rows read" in out and "(dolly): 1,000 rows read" in out
    assert "supervised (54%)" in out  # assistant-only loss comes from base.yaml, two files below
    assert "500 used (213 of them again)" in out and "500 rows, 457 prompts" in out
