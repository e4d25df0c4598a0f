"""Run a recipe: step by step, each keyed by all it depends on, each judged from the files it wrote.

1. A step begins from the saved result of the one before, also in an uninterrupted run. So a run that was killed and one
   that was not give the same numbers, and every checkpoint is loaded once before anybody relies on it.
2. A step that changes nothing writes no model, and nothing is judged again: the stage before goes on. What a step makes
   beside the model lies in its folder, where later steps find it.
3. Times are taken when all stages are there, in turn: minutes apart, two models of equal shape have differed by a third.
4. Under `torchrun` or `accelerate launch` every process walks through the same steps. The main one alone judges and
   writes, the others wait where its files are read back, so all must see the run folder. What a method does outside
   `fit`, each of them does for itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overhaul import __version__, models, processes, session
from overhaul.data.examples import Encoded, Examples
from overhaul.errors import OverhaulError, RequestError, RunError, writing
from overhaul.files import read_json, remove, write_json, write_text
from overhaul.judge import cost as costs
from overhaul.judge import harness
from overhaul.judge import judge as judging
from overhaul.judge.measure import Measure
from overhaul.method import Material
from overhaul.outcome import OutcomeError
from overhaul.recipe import finished, lineage, machine, products, results, verbs
from overhaul.recipe.ahead import look_ahead
from overhaul.recipe.check import Checked, Step, check, encode_made, maker_of
from overhaul.recipe.materials import Reference, model_of
from overhaul.recipe.plan import disk_bytes
from overhaul.recipe.spec import Document
from overhaul.recipe.store import RunFolder, Stage, key_of, key_outside, model_key
from overhaul.recipe.track import track
from overhaul.report.html import write_html
from overhaul.versions import libraries, version_of


def start(document: Document, root: Path) -> dict[str, Any]:
    """Run a recipe in the folder `root`, or go on with it; the report's numbers.

    Raises:
        RequestError: the recipe, its data or the folder is wrong; nothing was started.
        RunError: a step failed; the steps before it are kept.
    """
    processes.start()
    checked = check(document)
    if not checked.steps:
        raise RequestError("The recipe has nothing but `compare:`, which `overhaul compare` runs.")
    folder = RunFolder(root)
    if processes.is_main():
        reads = [checked.model, *checked.references_read()]
        folder = RunFolder.claim(root, document.name, disk_bytes(checked), reads)
    processes.wait()
    with folder.held(), folder.logged(), session.using(device=checked.recipe.on, stack=checked.recipe.stack):
        return Runner(checked, folder).go()


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
        if data is None:  # else all was encoded and looked at before
            look_ahead(checked, data := checked.encode())
        self.data = data
        self.digests = {role: examples.digest() for role, examples in self.data.items()}
        self.digests |= {
            role: key_of(parts) for role, parts in self.checked.raw_rows().items() if role not in self.digests
        }
        self.warnings = [*checked.warnings, *self.repeated()]
        self.model: tuple[str, nn.Module] | None = None
        self.anchored: dict[str, judging.Anchor] = {}
        self.code = [version_of(module.__name__) for module in (judging, costs)]

    def go(self) -> dict[str, Any]:
        """All steps, all judgements and the published model; the report."""
        report = self.walk()[2]
        if processes.is_main():
            self.folder.tidy()
            if self.checked.recipe.track:
                track(self.checked.recipe.track, report)
            finished.remember(self.shown.root, self.checked)
        return report

    def walk(self) -> tuple[list[Stage], list[dict[str, Any]], dict[str, Any]]:
        """As `go`; the stages, what the judge said of each, without times, and the report."""
        parts = (model_key(self.checked.model), self.checked.recipe.dtype, *filter(None, [self.checked.recipe.stack]))
        start = Stage("before", key_of(*parts), self.checked.model)
        stages = [start]
        judged = [self.judge(start)]
        for step in self.checked.steps:
            stages.append(self.step(step, stages))
            judged.append(self.judge(stages[-1]))
            self.check_limits(stages, judged)
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
                "README.md": lineage.model_card(self.checked, report, stages[-1].facts),
            },
        )
        write_text(self.shown.root / "recipe.yaml", self.checked.document.text)
        write_json(self.shown.root / "lineage.json", history)
        self.show(report)

    def show(self, report: dict[str, Any]) -> None:
        """Write the report."""
        write_json(self.shown.root / "report.json", report)
        with writing(self.shown.root):
            write_html(report, self.shown.root / "report.html")

    def repeated(self) -> list[str]:
        """What the steps' verbs say to the history of the model that the run starts from."""
        history = lineage.history(self.checked.model.folder)
        if history is None:
            return []
        asked = (verbs.ask("check_history", step, self.digests, history) for step in self.checked.steps)
        return [warning for warnings in asked for warning in warnings]

    def load(self, stage: Stage) -> nn.Module:
        """The model of a stage; the last one loaded is kept."""
        if self.model is None or self.model[0] != stage.key:
            self.model = None
            self.model = (stage.key, self.opened(stage.facts))
        return self.model[1]

    def opened(self, facts: models.Checkpoint) -> nn.Module:
        """A checkpoint's model, on the device that the run uses."""
        torch.manual_seed(self.checked.recipe.seed)  # a start without weights draws them
        model = models.load_weights(facts, self.checked.recipe.dtype, self.checked.recipe.trust_remote_code)
        return model.to(processes.device())

    def key(self, step: Step, stages: list[Stage]) -> str:
        """All that a step's result depends on."""
        reads = {
            role: [self.digests.get(name) or self.reference_key(name, stages) for name in step.names(role)]
            for role in step.reads
        }
        parts = (step.name, step.method.version, dict(step.knobs), reads, self.checked.recipe.seed, __version__)
        return key_of(stages[-1].key, *parts)

    def reference_key(self, name: str, stages: list[Stage]) -> str:
        """The key of a model or product that a step only reads."""
        reference = self.checked.references[name]
        if "made" in reference:
            return key_of(self.maker(reference, stages).step_key, reference)
        return self.after(reference["after"], stages).key if "after" in reference else key_outside(reference)

    def after(self, name: str, stages: list[Stage]) -> Stage:
        """The stage a recipe calls `after: NAME`."""
        if name == "start":
            return stages[0]
        return stages[next(step.number for step in self.checked.steps if step.goes_by(name))]

    def maker(self, reference: Reference, stages: list[Stage]) -> Stage:
        """The stage of the step that made a product."""
        step = maker_of(reference, self.checked.steps[: len(stages) - 1])
        assert step is not None, "the recipe was checked"
        return stages[step.number]

    def reference_facts(self, name: str, stages: list[Stage]) -> models.Checkpoint:
        """The checkpoint of a model that a step only reads."""
        reference = self.checked.references[name]
        return model_of(reference) if "model" in reference else self.after(reference["after"], stages).facts

    def material(self, role: Material, name: str, stages: list[Stage]) -> Any:
        """One material, as the method's role wants it."""
        reference = self.checked.references.get(name)
        if reference is None:
            return self.data[name] if role.kind == "examples" else self.checked.raw_rows()[name]
        if "made" in reference:
            stage = self.maker(reference, stages)
            assert stage.place is not None and stage.record is not None, "a stage that made something has a place"
            made = stage.record["made"].get(reference["name"])
            if made is None:
                raise RunError(
                    f"{stage.name} made no {reference['name']!r} for the material {name!r} this time: it does so with some "
                    f"of its knobs or materials only. It ran with {dict(stage.record['knobs'])}."
                )
            kind = made["kind"]
            value = products.read(kind, products.place_of(stage.place, reference["name"], kind), self.checked.processor)
            if kind == "rows" and role.kind == "examples":
                return encode_made(name, reference, value, self.checked.processor)
            return self.opened(value) if role.kind == "model" else value
        if "tensors" in reference:
            return products.read("tensors", Path(reference["tensors"]))
        facts = self.reference_facts(name, stages)
        return self.opened(facts) if role.kind == "model" else facts

    def step(self, step: Step, stages: list[Stage]) -> Stage:
        """The stage after a step: found where it was done before, else made."""
        key = self.key(step, stages)
        place, what = self.folder.step(step.number, step.name, key), f"step {step.number} of {len(self.checked.steps)}"
        if processes.agreed(processes.is_main() and self.folder.finished_step(place)):
            session.say(f"{what}, {step.name}, was done before")
        else:
            session.say(f"{what}, {step.name}")
            self.make(step, stages, key, place)
            processes.wait()
        record = json.loads((place / "step.json").read_text(encoding="utf-8"))
        for stamp in ("files", "sha256"):
            record.pop(stamp, None)
        self.warnings += results.notes(step, record, self.folder.root / "steps")
        if not (place / "model").exists():
            return replace(stages[-1], name=step.name, record=record, place=place, step_key=key, changed=False)
        facts = replace(models.facts(place / "model"), source=f"step {step.number}")
        return Stage(step.name, key, facts, record, place, key)

    def make(self, step: Step, stages: list[Stage], key: str, place: Path) -> None:
        """Run one step into its place."""
        partial = place.with_name(f".{place.name}.partial")
        if processes.is_main():
            with writing(partial):
                remove(partial)
                partial.mkdir(parents=True)
        given: dict[str, Any] = {}
        if (subject := step.method.subject) is not None:
            opened = subject.kind == "model"
            given[subject.name] = self.load(stages[-1]) if opened else stages[-1].facts
        self.model = None  # the method may change it in place
        for role in step.method.roles:
            if role.name in step.reads:
                found = [self.material(role, name, stages) for name in step.names(role.name)]
                given[role.name] = found if role.many else found[0]
        if step.method.writes:
            given["out"] = partial / "model"
        torch.manual_seed(self.checked.recipe.seed)
        with session.using(scratch=self.folder.scratch(key)), machine.measured() as cost:
            try:
                outcome = step.method.call(**given, **step.knobs)
            except OutcomeError as error:
                kept = place.with_name(f"{place.name}.refused")
                raise results.refused(step, error, kept, self.checked) from error
            except OverhaulError as error:
                raise type(error)(f"Step {step.number}, {step.name}: {results.without_name(step, error)}") from error
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"Step {step.number}, {step.name}, ran out of memory. A smaller `batch_size`, `weights: lora` where the "
                    "method has it, or `dtype: bfloat16` need less; `overhaul plan` shows how much."
                ) from error
        if processes.is_main():
            record = results.save(step, stages[-1].facts, outcome, partial, self.checked)
            session.say(f"  took {cost.seconds:.1f} s")
            record |= {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "roles": self.sizes(step)}
            self.folder.finish_step(place, partial, record, key)

    def sizes(self, step: Step) -> dict[str, int]:
        """How many examples each of a step's roles has."""
        return {role: len(self.data[name]) for role in step.reads for name in step.names(role) if name in self.data}

    def judge(self, stage: Stage) -> dict[str, Any]:
        """What the judge says of a stage: found where it was judged before, else measured."""
        requests = [asdict(request) for request in self.checked.requests]
        roles = {role: self.digests[role] for request in self.checked.requests for role in request.roles.values()}
        anchors = {name: self.reference_key(name, []) for name in self.checked.anchors}
        tasks = [harness.content(one.task, one.options) for one in self.checked.requests if one.task]
        parts = (stage.key, requests, roles, self.code, anchors, libraries(), *tasks)
        path = self.folder.judged(key_of(*parts))
        if processes.is_main() and read_json(path, holds=("measures", "samples")) is None:
            session.say(f"judging {'the model as it came' if stage.name == 'before' else stage.name}")
            anchored = self.anchors()
            model = self.load(stage)
            torch.manual_seed(self.checked.recipe.seed)
            own = self.tokenizer(stage.facts)
            judgement = judging.judge(model, self.checked.requests, self.data, anchor=anchored, tokenizer=own)
            measures = [*judgement.measures, *costs.cost(model, stage.facts.bytes, self.sample()[1])]
            write_json(path, {"measures": [asdict(measure) for measure in measures], "samples": judgement.samples})
        processes.wait()
        return json.loads(path.read_text())

    def sample(self) -> tuple[str, Encoded | None]:
        """One example to run a model on, with the hash of the role that it is of."""
        found = ((self.digests[role], data[0]) for role, data in self.data.items() if len(data))
        return next(found, ("", None))

    def timed(self, stages: Sequence[Stage], judged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the judge said of stages, and their models' times: found where they were taken before, else taken in turn."""
        by_key = {stage.key: stage for stage in stages}
        digest, sample = self.sample()
        parts = (list(by_key), digest, self.checked.recipe.dtype, self.code, machine.describe())
        path = self.folder.timed(key_of(*parts))
        if processes.is_main() and read_json(path, holds=by_key) is None:
            session.say("timing the models in turn")
            self.model = None
            dtype = models.DTYPES[self.checked.recipe.dtype]
            needed = dtype.itemsize * sum(stage.facts.parameters for stage in by_key.values())
            # those that have no room beside each other are timed one by one
            together = [by_key] if needed <= machine.free_bytes() / 4 else [{key: by_key[key]} for key in by_key]
            found: dict[str, list[Measure]] = {}
            for group in together:
                found |= costs.times({key: self.opened(stage.facts) for key, stage in group.items()}, sample)
            write_json(path, {key: [asdict(measure) for measure in each] for key, each in found.items()})
        processes.wait()
        times = json.loads(path.read_text())
        return [
            {**one, "measures": [*one["measures"], *times[stage.key]]}
            for stage, one in zip(stages, judged, strict=True)
        ]

    def anchors(self) -> list[judging.Anchor]:
        """What the models say that the judge compares with: each read once, before another model is loaded."""
        for name in self.checked.anchors:
            if name not in self.anchored:
                self.model = None
                facts = self.reference_facts(name, [])
                model, own = self.opened(facts), self.tokenizer(facts)
                torch.manual_seed(self.checked.recipe.seed)
                known = judging.anchor_of(model, self.checked.requests, self.data, name=name, tokenizer=own)
                self.anchored[name] = known
        return [self.anchored[name] for name in self.checked.anchors]

    def tokenizer(self, facts: models.Checkpoint) -> Any:
        """A folder's own, where text is put to its model that is no material; else None."""
        return models.load_processor(facts) if any(one.task for one in self.checked.requests) else None

    def check_limits(self, stages: list[Stage], judged: list[dict[str, Any]]) -> None:
        """Refuse to go on from a step that broke a limit of the recipe; the report of all until then is written.

        Raises:
            RunError: with each limit that is broken.
        """
        first, broken = (
            judging.broken_limits(self.checked.requests, [Measure(**one) for one in judged[place]["measures"]])
            for place in (0, -1)
        )
        if not broken or not stages[-1].changed:
            return
        from_start = f" Before the first step it was so already: {'; '.join(first)}." if first else ""
        report = self.report(stages, judged)
        report["warnings"] = [*report["warnings"], *(f"{stages[-1].name}: {one}." for one in broken)]
        if processes.is_main():
            self.show(report)
        processes.wait()
        raise RunError(
            f"Step {len(stages) - 1}, {stages[-1].name}: {'; '.join(broken)}. {self.shown.root / 'report.html'} shows all "
            f"that was measured; the step's model is kept, and none is published. Change the step, or the limit.{from_start}"
        )

    def report(self, stages: list[Stage], judged: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything the report shows, aligned over the stages."""
        judged = [one for one, stage in zip(judged, stages, strict=True) if stage.changed]
        judged = self.timed([stage for stage in stages if stage.changed], judged)
        first = judged[0]
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
            "model": {"source": recipe.model, "class": facts.architecture, "parameters": results.counted(first, facts)},
            "stages": [stage.name for stage in stages if stage.changed],
            "measures": results.aligned(judged),
            "steps": [stage.record for stage in stages if stage.record is not None],
            "samples": samples,
            "warnings": self.warnings,
        }
