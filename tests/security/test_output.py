"""Names and texts from outside are shown without control characters: on the terminal, in a report, on the live page."""

import socket
import sys
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import expect
from tests.browser import opened
from tests.conftest import small_recipe
from tests.report.test_live import watched
from tests.terminal import run_on_terminal
from tests.tracking.run_files import new_run, write_steps

from tinyllama import api, cli, loading
from tinyllama.errors import InputError
from tinyllama.files import write_json
from tinyllama.formatting import visible
from tinyllama.recipe import Recipe
from tinyllama.report.page import write_report

CLEAR = "\x1b[2J\x1b]0;title\x07"
SHOWN = r"\x1b[2J\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, \u00e9 \u4e2d \U0001f600\ttab\nline", "plain, \u00e9 \u4e2d \U0001f600\ttab\nline"),
        (CLEAR, SHOWN),
        ("\x9b31m", r"\x9b31m"),
        ("invoice\u202etxt.exe", r"invoice\u202etxt.exe"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("\udcff", r"\udcff"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_tables_on_a_terminal_have_no_visible_escape_sequences(small: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tinyllama", "inspect", str(small / "recipe.yaml")]
    status, lines, _ = run_on_terminal(program, tmp_path, 160)
    assert status == 0
    assert lines and not [line for line in lines if r"\x1b" in line]


def test_escape_sequence_in_file_name_is_harmless(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / f"good{CLEAR}\n.jsonl").write_text('{"text": "some words"}\nno row\nno row\n')
    (raw / f"unread.{CLEAR}").touch()
    sources = {"own": {"format": "jsonl", "path": str(raw), "weight": 1}}
    command = ["prepare", str(small / "recipe.yaml"), "--data.store", str(tmp_path / "store"), "--data.sources"]
    assert cli.main([*command, yaml.safe_dump(sources, default_flow_style=True, width=10**6)]) == 0
    (raw / f"bad{CLEAR}\n.jsonl").write_bytes(b"PK\3\4")
    command[3] = str(tmp_path / "other")
    assert cli.main([*command, yaml.safe_dump(sources, default_flow_style=True, width=10**6)]) == 2
    assert cli.main(["inspect", str(tmp_path / "store")]) == 0
    output = capsys.readouterr()
    assert SHOWN in output.out
    assert rf"tinyllama: {raw}/bad{SHOWN}\n.jsonl: is a zip archive" in output.err
    assert not [character for character in output.out + output.err if character in "\x1b\x07\r"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer", f"a{CLEAR}"),
        ("tokenizer", "a\nplan: all is well"),
        ("data.sources.modules.path", f"b{CLEAR}"),
        ("release.baselines", [f"c{CLEAR}"]),
    ],
)
def test_recipe_with_escape_sequence_is_refused(small: Path, field: str, value: object) -> None:
    with pytest.raises(InputError, match="contains a control character") as error:
        Recipe.load(small / "recipe.yaml", {field: value})
    assert str(error.value).isprintable()


def test_oversized_recipe_is_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(f"# {'x' * (1 << 20)}\n" + yaml.safe_dump(small_recipe(small)))
    with pytest.raises(InputError, match=r"large\.yaml: is larger than 1 MiB"):
        Recipe.load(path)


def test_events_are_harmless_in_report_and_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, log = new_run(tmp_path)
    run = run_dir.path
    write_steps(log, 1, 5)
    log.event("failed", 5, problem=f"{CLEAR}<script>alert(1)</script>")
    html = write_report(run).read_text()
    assert "\x1b" not in html
    assert SHOWN in html
    assert html.count("<script") == 1  # its own
    (tmp_path / f"runs/{CLEAR}").symlink_to(run)
    assert cli.main(["runs", str(tmp_path / "runs")]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert SHOWN in output


def test_generated_text_is_harmless_on_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "stream_text", lambda *_, **__: iter(["word ", CLEAR]))
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(loading, name, lambda _: None)
    assert cli.main(["generate", "any", "word"]) == 0
    assert capsys.readouterr().out == f"word {CLEAR}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["generate", "any", "word"]) == 0
    assert capsys.readouterr().out == f"word {SHOWN}\n"


@pytest.mark.slow
def test_live_page_checks_host_and_runs_no_foreign_script(tmp_path: Path) -> None:
    attack = "\"><img src=x onerror='window.attacked = 1'></script><script>window.attacked = 1</script>"
    run_dir, log = new_run(tmp_path)
    run = run_dir.path
    write_steps(log, 1, 30, **{attack: 1.0})
    for event in ("skip", "rollback", "tracker-failed"):
        log.event(event, 20, reason=attack, problem=attack, tracker=attack)
    log.event("sample", 20, prompt=attack, greedy=attack, sampled=attack)
    write_json(
        run / "releases/releases.json",
        {"releases": [], "baselines": [{"name": attack, "hellaswag": 1.0, "source": "published"}]},
    )
    (tmp_path / f"runs/{attack.replace('/', '')}").symlink_to(run)
    with watched(tmp_path, "runs/small") as address:
        host, port = address.split("/")[2].split(":")
        assert status(int(port), f"{host}:{port}") == 200
        for other in ("attacker.example", f"attacker.example:{port}", "localhost.attacker.example", ""):
            assert status(int(port), other) == 400
        with opened(address) as seen:
            before = seen.page.locator("footer").inner_text()
            expect(seen.page.locator("footer")).not_to_have_text(before, timeout=30_000)  # the page was updated
            seen.page.locator("svg.wide .mark circle").first.hover()
            expect(seen.page.locator("#tip")).to_contain_text("<script>")
            expect(seen.page.locator("#section-samples")).to_contain_text("<script>")
            assert seen.page.evaluate("window.attacked") is None
            assert seen.external_requests() == []


def status(port: int, host: str) -> int:
    """Return the HTTP status for a request with this Host header."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return int(connection.recv(1 << 16).split()[1])
