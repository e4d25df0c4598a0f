from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from overhaul import session
from overhaul.claims import _claim
from overhaul.claims._claim import Check, Claim, claims_page, find, print_result, reproduce, slugs, stored, verdict
from overhaul.errors import RequestError


def run(seed: int) -> dict[str, float]:
    return {"method": 0.1 * seed, "baseline": 1.0, "drawn": torch.rand(()).item(), "ratio": math.inf}


CLAIM = Claim(
    slug="example",
    paper="0000.00000",
    title="An example | with a bar",
    statement="The method is below the baseline.",
    checks=(
        Check("below the baseline by 0.5", lambda n: n["method"] <= n["baseline"] - 0.5),
        Check("below 0.15 | or so", lambda n: n["method"] < 0.15),
        Check("above the baseline", lambda n: n["method"] > n["baseline"]),
    ),
    run=run,
)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_claim, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_check_holds_only_if_it_passes_on_every_seed() -> None:
    result = reproduce(CLAIM, 3)
    assert [check["passed"] for check in result["checks"]] == [[True] * 3, [True, True, False], [False] * 3]
    verdicts = [verdict(check["passed"]) for check in result["checks"]]
    assert verdicts == ["holds", "holds on 2 of 3 seeds", "holds on 0 of 3 seeds"]


def test_a_result_says_with_what_and_when_it_was_measured(results: Path) -> None:
    result = reproduce(CLAIM, 3)
    assert result["numbers"]["method"] == [0.0, 0.1, 0.2]
    assert result["numbers"]["ratio"] == [None] * 3
    assert {"cpu", "cores", "python", "torch", "transformers"} <= result["machine"].keys()
    assert len(result["seconds"]) == 3
    assert json.loads((results / "example.json").read_text()) == result == stored()[0]


def test_every_seed_starts_from_its_own_seed() -> None:
    first, again = (reproduce(CLAIM, 2)["numbers"]["drawn"] for _ in range(2))
    assert first == again
    assert first[0] != first[1]


def test_too_few_seeds_are_not_stored(results: Path) -> None:
    reproduce(CLAIM, 2)
    assert stored() == []
    assert not results.exists()


def test_a_folder_that_cannot_be_written_does_not_lose_the_result(results: Path) -> None:
    results.write_text("in the way")
    assert reproduce(CLAIM, 3)["numbers"]["baseline"] == [1.0] * 3


def test_trainings_inside_find_no_checkpoints(tmp_path: Path) -> None:
    seen: list[Path | None] = []

    def look(seed: int) -> dict[str, float]:
        seen.append(session.current().scratch)
        return {"seed": seed}

    with session.using(scratch=tmp_path):
        reproduce(Claim("example", "", "", "", (), look), 1)
    assert seen == [None]


def test_the_terminal_shows_claim_verdicts_and_numbers() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_result(reproduce(CLAIM, 3), console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for part in ("The method is below the baseline.", "holds on 2 of 3 seeds", "baseline", "not finite", "s a seed"):
        assert part in text


def test_the_page_is_written_from_what_is_stored() -> None:
    assert "##" not in claims_page()
    reproduce(CLAIM, 3)
    page = claims_page()
    assert "1 of 3 checks hold" in page
    assert r"| below 0.15 \| or so | holds on 2 of 3 seeds |" in page
    assert "| method | 0 | 0.1 | 0.2 |" in page


def test_claims_are_found_by_short_name_and_described_in_full() -> None:
    assert {"ssd", "retrain-equivalence"} <= set(slugs())
    for claim in find(["all"]):
        assert claim.slug in slugs()
        assert claim.statement.endswith(".")
        assert claim.checks
    assert find(["retrain_equivalence", "retrain-equivalence"]) == find(["retrain-equivalence"])


def test_an_unknown_claim_gets_a_hint() -> None:
    with pytest.raises(RequestError, match=r"no claim 'sdd'\. Did you mean 'ssd'"):
        find(["sdd"])
