"""Run a recipe: step by step, each keyed by all it depends on, each judged from the files it wrote.

1. A step begins from the saved result of the one before, also in an uninterrupted run. So a run that was killed and one
   that was not give the same numbers, and every checkpoint is loaded once before anybody relies on it.
2. Under `torchrun` or `accelerate launch` every process walks through the same steps. The main one alone judges and
   writes, the others wait where its files are read back, so all must see the run folder. What a method does outside
   `fit`, each of them does for itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import __version__, models, processes, session
from overhaul.data.examples import Examples
from overhaul.errors import OverhaulError, RequestError, RunError, writing
from overhaul.files import write_json, write_text
from overhaul.judge import judge as judging
from overhaul.method import Outcome
from overhaul.recipe import lineage, machine
from overhaul.recipe.check import RETRAINED, Checked, Step, check
from overhaul.recipe.spec import read
from overhaul.recipe.store import RunFolder, Stage, code_version, key_of
from overhaul.report.html import write_html
from overhaul.weights import relative_change


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the report's numbers (the content of report.json)."""

    folder: Path
    report: dict[str, Any]


def run(source: str | Path | Mapping[str, Any], out: str | Path | None = None) -> Run:
    """Run a recipe, or go on with it where it stopped.

    Args:
        source: a recipe file, or the same as a mapping.
        out: the run folder; `runs/NAME` if None.

    Raises:
        RequestError: the recipe, its data or the folder is wrong; nothing was started.
        RunError: a step failed; the steps before it are kept.
    """
    processes.start()
    document = read(source)
    root = Path(out) if out is not None else Path("runs") / document.name
    # building the model's shapes takes seconds of imports; a run that ended once with this recipe has passed that check
    checked = check(document, shapes=not _ended(root, document.text))
    if not checked.steps:
        raise RequestError("The recipe has nothing but `compare:`, which `overhaul compare` runs.")
    folder = RunFolder(root)
    if processes.is_main():
        folder = RunFolder.claim(root, document.name, checked.model.bytes * (1 + len(checked.steps)))
    processes.wait()
    return Runner(checked, folder).go()


def _ended(root: Path, recipe: str) -> bool:
    """Whether the folder holds the report of a run of exactly this recipe."""
    path = root / "report.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["recipe"] == recipe


class Runner:
    """One walk through a checked recipe's steps.

    Args:
        checked: the request.
        folder: where steps and judgements are kept.
        data: the examples of every role, where they are at hand already.
        shown: where the model, the report and the lineage go; `folder` if not given.
    """

    def __init__(
        self,
        checked: Checked,
        folder: RunFolder,
        data: Mapping[str, Examples] | None = None,
        shown: RunFolder | None = None,
    ) -> None:
        self.checked, self.folder, self.shown = checked, folder, shown or folder
        session.current().report("reading data", 0, 1, "")
        self.data = checked.encode() if data is None else data
        judging.check_data(checked.requests, self.data)
        self.digests = {role: examples.digest() for role, examples in self.data.items()}
        self.warnings = [*checked.warnings, *self.repeated()]
        self.model: tuple[str, nn.Module] | None = None
        self.anchored: judging.Anchor | None = None

    def go(self) -> Run:
        """All steps, all judgements, the report and the published model."""
        return Run(self.shown.root, self.walk()[2])

    def walk(self) -> tuple[list[Stage], list[dict[str, Any]], dict[str, Any]]:
        """As `go`; the stages, what the judge said of each, and the report."""
        start = Stage("before", key_of(self.checked.model.digest(), self.checked.recipe.dtype), self.checked.model)
        stages = [start]
        judged = [self.judge(start)]
        for step in self.checked.steps:
            stages.append(self.step(step, stages))
            judged.append(self.judge(stages[-1]))
        report = self.report(stages, judged)
        if processes.is_main():
            self.publish(stages, report)
        processes.wait()
        return stages, judged, report

    def publish(self, stages: list[Stage], report: dict[str, Any]) -> None:
        """Put the last stage's model, the report and where all came from in their places."""
        history = lineage.lineage(self.checked, stages, self.digests, report)
        self.shown.publish(
            stages[-1].facts.folder,
            {
                "recipe.yaml": self.checked.document.text,
                "lineage.json": json.dumps(history, indent=1) + "\n",
                "README.md": lineage.model_card(self.checked, report),
            },
        )
        write_text(self.shown.root / "recipe.yaml", self.checked.document.text)
        write_json(self.shown.root / "lineage.json", history)
        write_json(self.shown.root / "report.json", report)
        with writing(self.shown.root):
            write_html(report, self.shown.root / "report.html")

    def repeated(self) -> list[str]:
        """A warning for every step that is to forget what this model was made to forget before."""
        found = []
        for step in self.checked.steps:
            digest = self.digests.get(step.reads.get("forget", ""))
            earlier = lineage.forgotten_before(self.checked.model.folder, digest) if digest else None
            if earlier is not None:
                found.append(
                    f"Step {step.number}, {step.name}: {earlier} made this model forget the same examples before. What is "
                    "forgotten twice ends up less likely than what was never seen, and an attacker can tell."
                )
        return found

    def load(self, stage: Stage) -> nn.Module:
        """The model of a stage; the last one loaded is kept."""
        if self.model is None or self.model[0] != stage.key:
            self.model = None
            recipe = self.checked.recipe
            self.model = (stage.key, models.load_weights(stage.facts, recipe.dtype, recipe.trust_remote_code))
            if torch.cuda.is_available():
                self.model[1].to("cuda")
        return self.model[1]

    def key(self, step: Step, stages: list[Stage]) -> str:
        """All that a step's result depends on."""
        reads = {role: self.digests.get(name) or self.reference_key(name, stages) for role, name in step.reads.items()}
        parts = (step.name, step.method.version, dict(step.knobs), reads, self.checked.recipe.seed, __version__)
        return key_of(stages[-1].key, *parts)

    def reference_key(self, name: str, stages: list[Stage]) -> str:
        """The key of a model that a step only reads."""
        reference = self.checked.references[name]
        if "model" in reference:
            return models.facts(reference["model"]).digest()
        return self.after(reference["after"], stages).key

    def after(self, name: str, stages: list[Stage]) -> Stage:
        """The stage a recipe calls `after: NAME`."""
        if name == "start":
            return stages[0]
        return stages[next(step.number for step in self.checked.steps if step.goes_by(name))]

    def reference_model(self, name: str, stages: list[Stage]) -> nn.Module:
        """A model that a step only reads."""
        reference = self.checked.references[name]
        facts = (
            models.facts(reference["model"]) if "model" in reference else self.after(reference["after"], stages).facts
        )
        return models.load_weights(facts, self.checked.recipe.dtype, self.checked.recipe.trust_remote_code)

    def step(self, step: Step, stages: list[Stage]) -> Stage:
        """The stage after a step: found where it was done before, else made."""
        key = self.key(step, stages)
        place = self.folder.step(step.number, step.name, key)
        if not processes.agreed((place / "step.json").exists()):
            self.make(step, stages, key, place)
            processes.wait()
        facts = replace(models.facts(place / "model"), source=f"step {step.number}")
        return Stage(step.name, key, facts, json.loads((place / "step.json").read_text()))

    def make(self, step: Step, stages: list[Stage], key: str, place: Path) -> None:
        """Run one step into its place."""
        partial = place.with_name(f".{place.name}.partial")
        if processes.is_main():
            with writing(partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        model = self.load(stages[-1])
        self.model = None  # the method may change it in place
        materials: dict[str, Any] = {}
        for role, name in step.reads.items():
            materials[role] = self.data[name] if name in self.data else self.reference_model(name, stages)
        torch.manual_seed(self.checked.recipe.seed)
        with session.using(scratch=self.folder.scratch(key)), machine.measured() as cost:
            try:
                outcome = step.method.call(model, **materials, **step.knobs)
            except OverhaulError as error:
                raise type(error)(f"Step {step.number}, {step.name}: {error}") from error
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"Step {step.number}, {step.name}, ran out of memory. A smaller `batch_size`, `weights: lora` where the "
                    "method has it, or `dtype: bfloat16` need less; `overhaul plan` shows how much."
                ) from error
        if processes.is_main():
            record = self.save(step, stages[-1].facts, outcome, cost, partial)
            self.folder.finish_step(place, partial, record, key)

    def save(
        self, step: Step, before: models.Checkpoint, outcome: Outcome, cost: machine.Measured, partial: Path
    ) -> dict[str, Any]:
        """Save what a step made into `partial` if it changed something; the step's record."""
        stored = self.checked.model.dtype
        with writing(partial):
            models.save(outcome.model, self.checked.processor, partial / "model", dtype=stored)
        touched = self.check_effect(step, before, models.facts(partial / "model"), stored)
        return {
            "name": step.name,
            "summary": step.method.summary,
            "paper": step.method.paper,
            "version": step.method.version,
            "knobs": dict(step.knobs),
            "seconds": cost.seconds,
            "peak_bytes": cost.peak_bytes,
            "facts": outcome.facts,
            "layers": {**outcome.layers, **({"relative change of the weights": touched} if touched else {})},
            "curves": outcome.curves,
            "roles": {role: len(self.data[name]) for role, name in step.reads.items() if name in self.data},
        }

    def check_effect(
        self, step: Step, before: models.Checkpoint, after: models.Checkpoint, dtype: str
    ) -> dict[int, float]:
        """How much the weights of each depth changed; empty where the tensors are others or there are several stacks.

        Raises:
            RunError: a step that should change the model did not.
        """
        if before.shapes != after.shapes:
            return {}
        change = relative_change(before.folder, after.folder)
        if step.method.changes != "nothing" and not any(change.by_tensor.values()):
            raise RunError(
                f"Step {step.number}, {step.name}, changed nothing that {dtype} weights can hold. Its knobs were "
                f"{dict(step.knobs)}: a higher learning rate, more steps or a lower threshold would change something."
            )
        one_stack = len({stack for stack, _ in change.by_depth}) == 1
        return {depth: value for (_, depth), value in change.by_depth.items()} if one_stack else {}

    def judge(self, stage: Stage) -> dict[str, Any]:
        """What the judge says of a stage: found where it was judged before, else measured."""
        requests = [asdict(request) for request in self.checked.requests]
        roles = {role: self.digests[role] for request in self.checked.requests for role in request.roles.values()}
        anchor = [self.reference_key(RETRAINED, [])] if self.checked.compares_with_retrained else []
        parts = (stage.key, requests, roles, code_version(Path(judging.__file__).parent), *anchor)
        path = self.folder.judged(key_of(*parts))
        if processes.is_main() and not path.exists():
            anchored = self.anchor()
            model = self.load(stage)
            torch.manual_seed(self.checked.recipe.seed)
            judgement = judging.judge(model, self.checked.requests, self.data, anchor=anchored)
            sample = next((data[0] for data in self.data.values() if len(data)), None)
            measures = [*judgement.measures, *judging.cost(model, stage.facts.folder, sample)]
            write_json(path, {"measures": [asdict(measure) for measure in measures], "samples": judgement.samples})
        processes.wait()
        return json.loads(path.read_text())

    def anchor(self) -> judging.Anchor | None:
        """What the retrained model says, if the judge compares with one: read once, before another model is loaded."""
        if self.checked.compares_with_retrained and self.anchored is None:
            self.model = None
            model = self.reference_model(RETRAINED, [])
            if torch.cuda.is_available():
                model.to("cuda")
            torch.manual_seed(self.checked.recipe.seed)
            self.anchored = judging.anchor_of(model, self.checked.requests, self.data)
        return self.anchored

    def report(self, stages: list[Stage], judged: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything the report shows, aligned over the stages."""
        first = judged[0]
        measures = []
        for n, measure in enumerate(first["measures"]):
            common = {name: value for name, value in measure.items() if name not in ("value", "runs")}
            runs = {"runs": [one["measures"][n]["runs"] for one in judged]} if measure["runs"] else {}
            measures.append({**common, "values": [one["measures"][n]["value"] for one in judged], **runs})
        samples = [
            {
                **{k: v for k, v in sample.items() if k != "output"},
                "outputs": [one["samples"][n]["output"] for one in judged],
            }
            for n, sample in enumerate(first["samples"])
        ]
        recipe, facts = self.checked.recipe, self.checked.model
        return {
            "title": self.checked.document.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "overhaul": __version__,
            "machine": machine.describe(),
            "seed": recipe.seed,
            "recipe": self.checked.document.text,
            "model": {"source": recipe.model, "class": facts.architecture, "parameters": facts.parameters},
            "stages": [stage.name for stage in stages],
            "measures": measures,
            "steps": [stage.record for stage in stages if stage.record is not None],
            "samples": samples,
            "warnings": self.warnings,
        }
