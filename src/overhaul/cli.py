"""The `overhaul` command. Heavy imports happen inside commands, so that help answers at once.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from overhaul import __version__
from overhaul.errors import OverhaulError, reading
from overhaul.quoting import shown

app = typer.Typer(
    help="Change a trained network, layer by layer, without training it again, and prove what the change did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
starters_app = typer.Typer(help="Small trained models and data that ship with Overhaul.", invoke_without_command=True)
app.add_typer(starters_app, name="starters")


class Terminal(Console):
    """A console that shows what rows and names hold: it is not steered by them, and `:word:` is no picture."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As a console does it; its own codes stay."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(shown(part.text), part.style)


console = Terminal(width=None if sys.stdout is not None and sys.stdout.isatty() else 110)
errors = Terminal(stderr=True)
notes = Terminal(stderr=True)

INTERRUPTED = 130
"""What the command line parser makes of Ctrl-C."""
_KEPT = "Finished steps are kept; the same command goes on from there."

Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run folder; runs/NAME if not given.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Device = Annotated[
    str | None, typer.Option("--device", help="In place of the recipe's: cpu, cuda, cuda:1, mps.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _say(text: str) -> None:
    """Print a line with paths or names in it, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


_interrupted = False


def _interrupt(*_: object) -> None:
    """Stop the work: also where a library catches it, at the next sign of progress."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _go_on() -> None:
    if _interrupted:
        raise KeyboardInterrupt


def _listen() -> None:
    """End as Ctrl-C does where the system asks for it, or where the terminal goes and `nohup` does not say to stay."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    gone = getattr(signal, "SIGHUP", None)
    if gone is not None and signal.getsignal(gone) is not signal.SIG_IGN:
        signal.signal(gone, _interrupt)


def _noted(message: Warning | str, category: type[Warning], filename: str, *place: Any) -> None:
    """Show a warning: of ours what it says, of a library's also where it is from."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    text = f"Note: {message}" if ours else warnings.formatwarning(message, category, filename, place[0]).rstrip()
    notes.print(text, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command; turn errors into one paragraph and an exit code. SIGTERM and SIGHUP end it as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread() and "LOCAL_RANK" not in os.environ:
        _listen()  # a launcher of several processes has its own use for signals
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what its encoding lacks is no reason to stop
    warnings.showwarning = _noted
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with reading("The folder in which the command was given"):
            os.getcwd()  # native libraries end the process where it is gone
        code = app(arguments, prog_name="overhaul", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # later nothing could be said of what does not get there
    except BrokenPipeError:  # `| head` has read enough; Rich ends so by itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except Exception as error:
        # what is said of work that was broken off, in the middle of an import for one, is not the reason
        code = INTERRUPTED if _interrupted else _said(error, debug)
    if code == INTERRUPTED:
        # a merge has no steps
        kept = "Nothing is kept; the same command starts anew." if arguments[:1] == ["merge"] else _KEPT
        _fail(f"Stopped. {kept}", debug)
        code = 1
    sys.exit(code or 0)


def _said(error: Exception, debug: bool) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, OverhaulError):
        _fail(str(error), debug)
        return error.exit_code
    if hasattr(error, "format_message"):  # one of the command line parser's own
        _fail(error.format_message(), debug=False)  # pyright: ignore[reportAttributeAccessIssue]
        return 2
    if isinstance(error, OSError) and _printed_nowhere():
        _fail(f"What was to be printed could not be written: {error.strerror}.", debug)
        return 1
    _fail(f"{type(error).__name__}: {error}. `--debug` shows where.", debug)
    return 1


def _printed_nowhere() -> bool:
    """Whether standard output takes no line. It is let go then: the interpreter would fail on what is held at its end."""
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    errors.print(f"[bold red]Error[/] {escape(message)}", soft_wrap=True, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


@contextmanager
def _progress() -> Iterator[None]:
    """Show what the running step reports: bars on a terminal, else a line for each step and each minute."""
    from overhaul import session

    if not console.is_terminal:
        lines = session.Lines(lambda text: notes.print(text, highlight=False, markup=False, soft_wrap=True))

        def line(what: str, done: int, total: int, detail: str) -> None:
            _go_on()
            lines.report(what, done, total, detail)

        with session.using(report=line, say=lines.say):
            yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    what, detail = (TextColumn(form, markup=False) for form in ("{task.description:<28}", "{task.fields[detail]}"))
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), detail)
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int, detail: str) -> None:
            _go_on()
            if what not in tasks or bar.tasks[tasks[what]].finished:
                for other in tasks.values():
                    bar.update(other, visible=False)
                tasks[what] = bar.add_task(what, total=total, detail=detail)
            bar.update(tasks[what], completed=done, total=total, detail=detail, visible=True)

        with session.using(report=report, say=lambda text: console.print(text, highlight=False, markup=False)):
            yield


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)]) -> None:
    """Write a first recipe, commented, and the data it reads into a new folder."""
    from overhaul.recipe.begin import begin

    for path in begin(folder):
        _say(str(path))
    _say(f"\nNext: cd {shlex.quote(str(folder))}; overhaul plan recipe.yaml; overhaul run recipe.yaml -o out")


@app.command()
def demo(out: Out = None, device: Device = None) -> None:
    """Forget four people, drop a quarter of the layers, heal, and judge: on the starter language model."""
    from overhaul.recipe.begin import packaged

    _run(packaged("forget-and-shrink"), out, device)


@app.command()
def run(recipe: RecipeFile, out: Out = None, device: Device = None) -> None:
    """Run a recipe, or go on with it where it stopped."""
    _run(recipe, out, device)


def _run(recipe: Path, out: Path | None, device: str | None) -> None:
    from overhaul.recipe.run import run as run_recipe
    from overhaul.report.terminal import print_table

    with _progress():
        done = run_recipe(recipe, out, device=device)
    print_table(done.report, console)
    _say(f"\nreport  {done.folder / 'report.html'}\nmodel   {done.folder / 'model'}")


@app.command()
def compare(
    recipe: RecipeFile,
    methods: Annotated[
        str, typer.Option("--methods", help="Methods of one verb, with commas; else the recipe's `compare:`.")
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How often each method runs.")] = 1,
    out: Out = None,
) -> None:
    """Run several methods from the same checkpoint and materials: one table, one scatter, a null control."""
    from overhaul.recipe.compare import compare as compare_methods
    from overhaul.report.comparison import Comparison

    names = [name.strip() for name in methods.split(",") if name.strip()]
    with _progress():
        done = compare_methods(recipe, names, out, seeds=seeds)
    Comparison.from_json(done.report).print(console)
    _say(f"\npage    {done.folder / 'comparison.html'}\nmodels  {done.folder}/METHOD/model")


@app.command()
def plan(recipe: RecipeFile) -> None:
    """Check a recipe and print its steps, peak memory and time, before any weight is read."""
    gc.disable()  # what libraries make when they are imported stays; looking it through takes a tenth of the time
    try:
        from overhaul.recipe.plan import planned

        planned(recipe).print(console)
    finally:
        gc.enable()
    console.print("The recipe is in order; nothing was written.")


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(help="mergekit's configuration file (YAML).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and say what it would make.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what dare and della draw.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the models.")] = False,
) -> None:
    """Merge models as a configuration file of mergekit says."""
    from overhaul.mergekit.run import merge_config, plan_config

    if dry_run:
        plan_config(config, out, trust_remote_code=trust_remote_code).print(console)
        console.print("The file is in order; nothing was written.")
        return
    with _progress():
        done = merge_config(config, out, seed=seed, trust_remote_code=trust_remote_code)
    _say(f"{done.facts['tensors_changed']} of {done.facts['tensors']} tensors are new\nmodel   {out}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]) -> None:
    """Print a finished run's or comparison's table again, and write its page anew."""
    from overhaul.report.again import again

    _say(f"\npage    {again(folder, console)}")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    name: Annotated[str, typer.Argument(help="The repository: owner/name.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; else only say what would go up.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Put a run's model, with its card and lineage, on the Hugging Face hub."""
    from overhaul.recipe.push import push as upload
    from overhaul.report.numbers import humanise

    done = upload(run, name, dry_run=not yes, public=public)
    for file, size in done.files.items():
        _say(f"  {file}  {humanise(size, 'bytes')}")
    nothing = f"Nothing was uploaded. `--yes` puts these {len(done.files)} files into {name}."
    _say(f"pushed  {done.url}" if yes else nothing)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or describe one: what it reads, its knobs and their defaults."""
    from overhaul.listing import entries, entry, print_all, print_one

    chosen = [entry(name)] if name else entries()
    if as_json:
        said = [{key: value for key, value in one.items() if key != "doc"} for one in chosen]
        print(json.dumps(said[0] if name else said, indent=1))
        return
    if name:
        print_one(chosen[0], console)
    else:
        print_all(chosen, console)


@app.command()
def reproduce(
    papers: Annotated[
        list[str], typer.Argument(help="Papers by their short name (ssd), or `all`.", show_default=False)
    ],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Run a paper's small experiment: the claim, its baselines and null control, the verdict."""
    from overhaul.claims import _claim

    chosen = _claim.find(papers)
    with _progress():
        results = [_claim.reproduce(claim, seeds) for claim in chosen]
    if as_json:
        print(json.dumps(results, indent=1))
        return
    for result in results:
        _claim.print_result(result, console)


@starters_app.callback()
def starters(context: typer.Context) -> None:
    """List the starter models with what their cards say."""
    if context.invoked_subcommand is None:
        from overhaul.models import starters as known

        for name, folder in known().items():
            console.print(f"[bold]starter:{name}[/]")
            console.print(escape((folder / "README.md").read_text(encoding="utf-8")), highlight=False)


@starters_app.command()
def build(
    name: Annotated[str, typer.Argument(help="The starter model to train.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
) -> None:
    """Train a starter model again from its recorded recipe and seed, and measure it."""
    from overhaul.starters import build as build_starter

    with _progress():
        card = build_starter(name, out)
    console.print(escape(card))
