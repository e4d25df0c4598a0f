"""The command: exit codes, one paragraph for an error, help at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from made_up import language_report
from overhaul import cli, listing
from overhaul.claims import _claim
from overhaul.errors import RequestError
from overhaul.recipe.begin import packaged
from overhaul.report.comparison import Comparison, Row

COMMAND = [str(Path(sys.executable).parent / "overhaul")]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["overhaul", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    program = (
        "import sys; sys.argv = ['overhaul', '--help']\n"
        "from overhaul.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("False False")
    times = []
    for _ in range(3):
        started = time.process_time(), time.perf_counter()
        subprocess.run([*COMMAND, "--help"], capture_output=True, check=True, timeout=60)
        times.append(time.perf_counter() - started[1])
    assert min(times) < 2.0, "0.7 s on an idle machine; tests share theirs"


def test_wrong_requests_exit_with_2_and_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "run", str(tmp_path / "no.yaml")) == 2
    error = capsys.readouterr().err
    assert "There is no recipe at" in error and "Traceback" not in error
    assert call(monkeypatch, "methods", "forget.sdd") == 2
    assert "Did you mean 'forget.ssd'?" in capsys.readouterr().err
    assert call(monkeypatch, "rnu") == 2
    assert call(monkeypatch, "report", str(tmp_path)) == 2
    assert call(monkeypatch, "starters", "build", "docs-lama", "-o", str(tmp_path / "x")) == 2
    assert call(monkeypatch, "reproduce", "sdd") == 2


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "run", str(tmp_path / "no.yaml"), "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert call(monkeypatch, "demo") == 1
    assert "same command goes on" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("overhaul.mergekit.run.merge_config", lambda *_, **__: interrupted())
    assert call(monkeypatch, "merge", "merge.yml", "-o", "out") == 1
    assert "Nothing is kept; the same command starts anew." in " ".join(capsys.readouterr().err.split())


def test_methods_lists_as_table_and_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "methods", "--json") == 0
    listing = json.loads(capsys.readouterr().out)
    assert {"forget.npo", "forget.ssd", "shrink.drop_layers", "shrink.heal"} <= {entry["name"] for entry in listing}
    assert all(entry["materials"][0]["kind"] in ("model", "checkpoint") for entry in listing)
    assert call(monkeypatch, "methods", "ssd") == 0
    shown = capsys.readouterr().out
    assert "arXiv:2308.07707" in shown and "alpha" in shown
    assert call(monkeypatch, "methods") == 0


def test_plan_reads_no_weights_and_lists_every_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from overhaul import models

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "load_weights", never)
    assert call(monkeypatch, "plan", str(packaged("forget-and-shrink"))) == 0
    shown = capsys.readouterr().out
    for step in ("forget.npo", "shrink.drop_layers", "shrink.heal"):
        assert step in shown
    assert "nothing was written" in shown


def test_every_claim_has_a_stored_result_or_can_be_found() -> None:
    assert {claim.slug for claim in _claim.find(["all"])} >= {"ssd", "retrain-equivalence", "layer-pruning-limits"}


def test_a_docstring_is_wrapped_once_by_whoever_shows_it() -> None:
    doc = """Do it: this
and that.

    x_i = a    if b

1. First: one
   goes on.
2. Second.

Args:
    a: what
        it is: so.
    b, c: both.
"""
    assert [part for part in listing.paragraphs(doc) if part[1]] == [
        (0, "Do it: this and that."), (4, "x_i = a    if b"), (0, "1. First: one goes on."), (0, "2. Second."),
        (0, "Args:"), (4, "a: what it is: so."), (4, "b, c: both."),
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["", '{"a', "[]", "{}"])
def test_a_damaged_report_is_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(damage)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(RequestError, match=r"report\.json is damaged"):
        cli.report(tmp_path)


def odd_reports(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A report with each of its parts gone or of another kind."""
    for key in whole:
        yield {name: value for name, value in whole.items() if name != key}
        for value in (None, [7]):
            yield {**whole, key: value}


@pytest.mark.filterwarnings("ignore")  # damage is said as a warning too
def test_a_report_of_somebody_else_is_shown_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: Counter[int] = Counter()
    for content in odd_reports(language_report()):
        (tmp_path / "report.json").write_text(json.dumps(content))
        code = call(monkeypatch, "report", str(tmp_path))
        said = capsys.readouterr().err
        found[code] += 1
        assert code == 0 or (
            code == 2 and "report.json is damaged, or not of this version" in " ".join(said.split())
        ), said
        assert "Traceback" not in said
    assert found.keys() == {0, 2}, found


def test_a_comparison_is_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = {"group": "kept", "metric": "accuracy", "label": "accuracy", "help": "", "on": "retain"}
    measure |= {"unit": "share", "better": "up", "wanted": "same", "n": 4}
    rows = [Row("before", "before", [[1.0]]), Row("forget.npo", "method", [[0.5]])]
    Comparison("mine", [measure], rows, {"recipe": "", "warnings": []}).write(tmp_path)
    (tmp_path / "comparison.html").unlink()
    assert call(monkeypatch, "report", str(tmp_path)) == 0
    assert "forget.npo" in capsys.readouterr().out and "forget.npo" in (tmp_path / "comparison.html").read_text()


def test_a_terminal_that_goes_ends_the_work_unless_nohup_says_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        for stays in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGHUP, stays)
            cli._listen()
            ends = stays is signal.SIG_DFL
            assert (signal.getsignal(signal.SIGHUP) is cli._interrupt) == ends
            assert signal.getsignal(signal.SIGTERM) is cli._interrupt
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.smoke
@pytest.mark.parametrize("options", ["", "--json"])
def test_who_reads_only_the_beginning_hears_no_complaint(options: str) -> None:
    command = f"{sys.executable} -m overhaul methods {options} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout and not done.stderr


@pytest.mark.smoke
def test_closed_outputs_and_a_folder_that_is_gone(tmp_path: Path) -> None:
    command = f"{sys.executable} -m overhaul methods shrink.prune"
    assert subprocess.run(["bash", "-c", f"{command} >&-"], timeout=60).returncode == 0
    (tmp_path / "gone").mkdir()
    gone = f"cd {tmp_path}/gone; rmdir ../gone; {command}"
    done = subprocess.run(["bash", "-c", gone], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "The folder in which the command was given cannot be read" in done.stderr


@pytest.mark.smoke
@pytest.mark.parametrize("arguments", ["methods", "methods --json", "--help"])
def test_a_full_disk_behind_the_output_is_one_sentence(arguments: str) -> None:
    command = f"{sys.executable} -m overhaul {arguments} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr == "Error What was to be printed could not be written: No space left on device.\n"
