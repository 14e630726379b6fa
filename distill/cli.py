"""The command line: verbs and their options. No logic: each verb calls the module that has it.

Nothing heavy is imported at the top, so that help and usage errors answer at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from distill.errors import UsageError

app = typer.Typer(
    name="distill",
    help="Distil long-document classifiers into small ones, with results that can be believed.",
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Start here: distill teacher --recipe quickstart. Add --debug to any command for a traceback.",
)
recipes_app = typer.Typer(help="List, show and copy the recipes that ship.", no_args_is_help=False)
cache_app = typer.Typer(help="Cache a teacher's logits; list and verify caches.", no_args_is_help=False)
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)
app.add_typer(cache_app, name="cache", invoke_without_command=True)

RecipeOption = Annotated[
    Optional[str], typer.Option("--recipe", "-r", help="A shipped recipe's name, or a YAML file.")
]
SetOption = Annotated[
    Optional[list[str]],
    typer.Option("--set", "-s", help="Change a key: teacher.train.learning_rate=3e-5. Repeatable."),
]
NameOption = Annotated[
    Optional[str], typer.Option("--name", help="The run's name; run1, run2, … where absent.")
]
TeacherOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--teacher", "-t", help="A run, an MLflow run id, a model folder or a hub id. Repeat for an ensemble."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Read the data, show what would be done and what it costs, and stop."),
]
ResumeOption = Annotated[
    Optional[str], typer.Option("--resume", help="Go on with this run, with its own recipe.")
]
ProcessesOption = Annotated[
    Optional[int],
    typer.Option(
        "--processes",
        min=1,
        max=1024,
        help="Share the work among this many processes of this machine: one a GPU, or some of its cores each. "
        "Under torchrun or accelerate launch: what they must have started.",
    ),
]
AnyProcessesOption = Annotated[
    bool,
    typer.Option(
        "--any-processes",
        help="With --resume: on another number of processes than before. Each step has the same documents; the "
        "weights differ by rounding, and by dropout's masks, which each process draws for its own documents.",
    ),
]


def _only_with_resume(any_processes: bool, resume: str | None) -> None:
    if any_processes and resume is None:
        raise UsageError(
            "--any-processes: only a run that is gone on with (--resume) had a number of them before"
        )


@app.command(epilog="Example: distill teacher --recipe imdb --set teacher.train.learning_rate=3e-5")
def teacher(
    recipe: RecipeOption = None,
    set_: SetOption = None,
    name: NameOption = None,
    resume: ResumeOption = None,
    processes: ProcessesOption = None,
    any_processes: AnyProcessesOption = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a long-context teacher."""
    from distill import launching, runs, show
    from distill import recipe as recipes
    from distill.progress import say

    if (recipe is None) == (resume is None):
        raise UsageError("give --recipe to begin a run, or --resume to go on with one")
    if resume is not None and (set_ or name):
        raise UsageError("--resume goes on with the run's own recipe and name: leave --set and --name out")
    _only_with_resume(any_processes, resume)
    if name is not None:
        runs.refuse_taken(name)
    found = recipes.load(recipe or str(runs.find(resume or "").recipe), set_ or [])
    recipe_name = recipe if recipe else runs.find(resume or "").read().recipe
    launching.launch(None if dry_run else processes, sharded=True)
    from distill import stages

    if dry_run:
        show.plan(stages.plan_teacher(found))
        return
    done = stages.train_teacher(found, recipe_name, name, resume, any_processes=any_processes)
    show.finished([done])
    say(f"next: distill student --teacher {done.name}")


@app.command(
    epilog="Example: distill pretrain --recipe imdb --student fnet --set student.checkpoint=null "
    "--corpus reviews.txt. Then: distill student --teacher run1 --set student.checkpoint=runs/run2/model"
)
def pretrain(
    recipe: RecipeOption = None,
    student: Annotated[
        Optional[str],
        typer.Option("--student", help="bert_tiny, distilbert, fnet, … in place of the recipe's."),
    ] = None,
    corpus: Annotated[
        Optional[list[str]],
        typer.Option(
            "--corpus",
            help="Text beside the recipe's own: a .txt with a document a line, a csv, … Repeatable.",
        ),
    ] = None,
    teacher: Annotated[
        Optional[str],
        typer.Option(
            "--teacher",
            "-t",
            help="A masked language model to learn from: a run of pretrain, a folder or a hub id.",
        ),
    ] = None,
    set_: SetOption = None,
    name: NameOption = None,
    resume: ResumeOption = None,
    processes: ProcessesOption = None,
    any_processes: AnyProcessesOption = False,
    dry_run: DryRun = False,
) -> None:
    """Pre-train a student as a masked language model, on text without labels."""
    from distill import launching, runs, show
    from distill import recipe as recipes

    if (recipe is None) == (resume is None):
        raise UsageError("give --recipe to begin a run, or --resume to go on with one")
    _only_with_resume(any_processes, resume)
    if resume is not None:
        if student or corpus or teacher or set_ or name:
            raise UsageError("--resume goes on with what the run was asked for: leave the other options out")
        run = runs.find(resume).read()
        if run.role != "pretrained":
            raise UsageError(f"--resume: {resume} is a {run.role} run, and no pre-training")
        found = recipes.load(str(runs.find(resume).recipe))
        recipe_name, model = run.recipe, run.model
    else:
        wished = {"corpus": corpus, "teacher": teacher}
        settings = [f"pretraining.{key}={json.dumps(value)}" for key, value in wished.items() if value]
        settings = [*(set_ or []), *settings]
        found = recipes.load(recipe or "", settings, student)
        recipe_name, model = recipe or "", student or found.student.architecture
    if name is not None:
        runs.refuse_taken(name)
    launching.launch(None if dry_run else processes)
    from distill import pretraining

    if dry_run:
        show.plan(pretraining.plan(found))
        return
    done = pretraining.pretrain(found, recipe_name, model, name, resume, any_processes=any_processes)
    show.pretrained(done)


@app.command(epilog="Example: distill student --teacher run1 --student bert_tiny --seeds 3")
def student(
    teacher: TeacherOption = None,
    student: Annotated[
        Optional[str],
        typer.Option("--student", help="bert_tiny, distilbert, tfidf, … in place of the recipe's."),
    ] = None,
    recipe: RecipeOption = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Train this many, with different seeds.")] = 1,
    control: Annotated[
        bool,
        typer.Option("--control/--no-control", help="Train the same student without the teacher beside it."),
    ] = True,
    logits: Annotated[
        Optional[str], typer.Option(help="Use these cached logits (a cache's name or folder).")
    ] = None,
    set_: SetOption = None,
    name: NameOption = None,
    resume: ResumeOption = None,
    processes: ProcessesOption = None,
    any_processes: AnyProcessesOption = False,
    dry_run: DryRun = False,
) -> None:
    """Train small students on labels and on the teacher's logits, each beside its control."""
    from distill import catalog, launching, records, runs, show
    from distill import recipe as recipes
    from distill.progress import say

    _only_with_resume(any_processes, resume)
    if resume is not None:
        if teacher or recipe or set_ or name or student or logits:
            raise UsageError("--resume goes on with what the run was asked for: leave the other options out")
        asked = runs.find(resume).read()
        if "student" not in asked.command:
            verb = "pretrain" if asked.role == "pretrained" else "teacher"
            raise UsageError(f"--resume: {resume} is a {asked.role}'s run; distill {verb} --resume {resume}")
        launching.launch(processes)
        from distill import stages

        wished = {**asked.command, "any_processes": any_processes}
        job = records.check(wished, stages.StudentJob, f"{resume}/run.json")
    else:
        if student is not None:
            catalog.preset(student)
        where, recipe_name = runs.recipe_of(teacher or [], recipe)
        found = recipes.load(where, set_ or [], student)
        if dry_run:
            from distill import stages

            show.plan(stages.plan_students(found, teacher or []))
            return
        if name is not None:
            runs.refuse_taken(name)
        launching.launch(processes)
        from distill import stages

        job = stages.StudentJob(
            teachers=list(teacher or []),
            recipe=found.dump(),
            recipe_name=recipe_name,
            student=student or found.student.architecture,
            group=runs.claim(name),
            seeds=seeds,
            control=control,
            logits=logits,
        )
    done = stages.train_students(job)
    show.finished(done)
    say(f"next: distill compare {job.group}")


@app.command(
    epilog="Example: distill sweep --teacher run1 --students bert_tiny,bert_mini "
    "--grid student.losses.0.temperature=1,2,4 --seeds 3"
)
def sweep(
    students: Annotated[str, typer.Option(help="Names of students, with commas between them.")],
    teacher: TeacherOption = None,
    grid: Annotated[
        Optional[list[str]],
        typer.Option(
            "--grid", "-g", help="Values of a key under student., with commas: key=1,2,4. Repeatable."
        ),
    ] = None,
    search: Annotated[
        Optional[list[str]],
        typer.Option(
            "--search",
            help="What a key under student. can be: key=1e-4..1e-3:log, key=1..8 or key=head,tail. Repeatable. "
            "Validation chooses.",
        ),
    ] = None,
    trials: Annotated[
        Optional[int],
        typer.Option(
            min=1, max=1000, help="Of each student with --search, and of its control; 20 where absent."
        ),
    ] = None,
    recipe: RecipeOption = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Train each this many times, with different seeds.")
    ] = 1,
    control: Annotated[
        bool,
        typer.Option("--control/--no-control", help="Train each student without the teacher, too."),
    ] = True,
    bench: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure latency, throughput and memory at the end.")
    ] = True,
    set_: SetOption = None,
    name: Annotated[
        Optional[str], typer.Option("--name", help="The group's name; TEACHER-sweep where absent.")
    ] = None,
    processes: ProcessesOption = None,
    dry_run: DryRun = False,
) -> None:
    """Train every combination of students and values, from one cache. The same command again goes on."""
    from distill import launching, runs, show
    from distill import search as searching
    from distill import sweep as sweeping
    from distill.progress import say

    if not teacher:
        raise UsageError("--teacher is missing (a run, a folder or a hub id)")
    if grid and search:
        raise UsageError("a sweep takes --grid or --search; a choice of --search is written as --grid's are")
    if trials and not search:
        raise UsageError("--trials: only a --search has them; a grid is trained as a whole")
    group = sweeping.group_name(name, teacher[0])
    values = sweeping.read_grid(grid or [])
    axes = searching.read_axes(search) if search else {}
    where, recipe_name = runs.recipe_of(teacher, recipe)
    launching.launch(None if dry_run else processes)
    if axes:
        asked = searching.Search(
            where, recipe_name, set_ or [], students.split(","), axes, teacher, group, trials or 20, seeds,
            control,
        )  # fmt: skip
        corpus, parts = searching.check(asked)
        show.search(asked, parts)
        if dry_run:
            return
        best = searching.run(asked, corpus, parts)
        show.comparison([name for one in best for name in one.part.names], bench=bench, report=None)
        show.best(best, corpus.task.metric)
        return
    found = sweeping.combinations(where, set_ or [], students.split(","), values, group, control=control)
    corpus, parts = sweeping.plan(found, recipe_name, teacher, group, seeds)
    show.sweep(parts)
    if dry_run:
        return
    sweeping.run(parts, corpus)
    show.comparison([group], bench=bench, report=None)
    say(f"again: distill compare {group}")


@cache_app.callback(
    epilog="Example: distill cache --teacher run1 --split transfer; distill cache ls; distill cache verify"
)
def cache(
    context: typer.Context,
    teacher: TeacherOption = None,
    split: Annotated[
        Optional[list[str]], typer.Option(help="train, validation or transfer; all of them where absent.")
    ] = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Write a teacher's logits down, once for all students."""
    if context.invoked_subcommand is not None:
        return
    if not teacher:
        raise UsageError("--teacher is missing; distill cache ls lists what is cached")
    from distill import launching, runs
    from distill import recipe as recipes
    from distill.processes import is_main

    for one in split or []:
        if one not in ("train", "validation", "transfer"):
            raise UsageError(f"--split: no split {one!r} to cache; train, validation or transfer")
    found = recipes.load(runs.recipe_of(teacher, recipe)[0], set_ or [])
    launching.launch(processes)
    from distill import caching, fitting

    corpus = fitting.load_corpus(found)
    for one in teacher:
        cached = caching.cache_logits(caching.find_teacher(one), found, corpus, split)
        if is_main():
            typer.echo(f"{cached.folder.name}: {len(cached):,} rows")


@cache_app.command("ls", epilog="Example: distill cache ls")
def cache_list() -> None:
    """List the caches."""
    from distill import show

    show.caches()


@cache_app.command("verify", epilog="Example: distill cache verify 3f2a9c0d1b7e4a55")
def cache_verify(
    names: Annotated[Optional[list[str]], typer.Argument(help="Caches; all where absent.")] = None,
) -> None:
    """Compare every shard with its hash, and look for NaN."""
    from distill import logits

    for folder in [logits.find(name) for name in names] if names else logits.every():
        typer.echo(f"{folder.name}: {logits.verify(folder):,} rows, every hash holds")


@app.command(epilog="Example: distill compare run2 --no-bench")
def compare(
    names: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[RUN]...", help="Runs or groups; the newest experiment's where absent."),
    ] = None,
    bench: Annotated[
        bool, typer.Option("--bench/--no-bench", help="Measure latency, throughput and memory.")
    ] = True,
    report: Annotated[
        Optional[Path], typer.Option(help="Where the report goes; into the newest run's folder where absent.")
    ] = None,
) -> None:
    """Show what each model costs and gives, side by side; write a report and a chart."""
    from distill import show

    show.comparison(names or [], bench=bench, report=report)


@app.command(epilog="Example: distill demo")
def demo(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="What to run.")] = "quickstart",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Students to train.")] = 3,
    processes: ProcessesOption = None,
) -> None:
    """Run the whole path: teacher, cached logits, students with controls, table. Goes on where it stopped."""
    from distill import launching, show

    launching.launch(processes)
    show.demo(recipe, seeds)


@app.command(epilog="Example: distill predict --run run2 reviews.txt > labels.jsonl")
def predict(
    file: Annotated[Path, typer.Argument(help="Lines of text, a csv or a jsonl; - for standard input.")],
    run: Annotated[str, typer.Option("--run", help="A finished run.")],
    text: Annotated[str, typer.Option(help="The text's column.")] = "text",
    text_pair: Annotated[Optional[str], typer.Option(help="The second text's column.")] = None,
    quotes: Annotated[
        bool, typer.Option("--quotes/--no-quotes", help="Whether quotes in a csv or tsv have a meaning.")
    ] = True,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Write here in place of standard output.")
    ] = None,
) -> None:
    """Classify documents, or find answers: a line of JSON each, with label and probabilities, or answer and place."""
    from distill import runs

    runs.refuse_unfinished(run)
    from distill import prediction

    prediction.predict(runs.find(run), file, text, text_pair, output, quotes)


@app.command(epilog="Example: distill validate my-recipe.yaml --set teacher.max_length=512")
def validate(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")], set_: SetOption = None
) -> None:
    """Check a recipe without reading its data."""
    from distill import recipe as recipes

    found = recipes.load(recipe, set_ or [])
    typer.echo(
        f"{recipe}: a valid recipe ({found.teacher.architecture} teacher, {found.student.architecture} student)"
    )


@recipes_app.callback(epilog="Example: distill recipes copy imdb my-recipe.yaml")
def recipes_list(context: typer.Context) -> None:
    """List the recipes that ship, a line each."""
    if context.invoked_subcommand is not None:
        return
    from distill import recipe as recipes

    shipped = recipes.descriptions()
    width = max(len(name) for name in shipped)
    for name, description in shipped.items():
        typer.echo(f"{name:<{width}}  {description}")


@recipes_app.command("show", epilog="Example: distill recipes show quickstart")
def recipes_show(name: Annotated[str, typer.Argument(help="A recipe's name.")]) -> None:
    """Print a recipe as it was written."""
    from distill import recipe as recipes

    typer.echo(recipes.find(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy", epilog="Example: distill recipes copy quickstart my-recipe.yaml")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="A recipe's name.")],
    path: Annotated[Optional[Path], typer.Argument(help="The new file; NAME.yaml here where absent.")] = None,
) -> None:
    """Copy a recipe, to change it."""
    from distill import recipe as recipes
    from distill.files import write_text

    target = path or Path(f"{Path(name).stem}.yaml")
    if target.exists():
        raise UsageError(f"{target} exists already; give another path")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}")
    write_text(target, recipes.find(name).read_text(encoding="utf-8"))
    typer.echo(f"{target}: change it, then distill validate {target}")


@app.command("runs", epilog="Example: distill runs --json")
def list_runs(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List all runs."""
    from distill import runs

    if as_json:
        rows: list[dict[str, Any]] = [vars(folder.read()) for folder in runs.every()]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from distill import show

    show.runs_table()


@app.command(epilog="Example: distill ui --port 5000")
def ui(
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="On 127.0.0.1; the next free one when taken.")
    ] = 5000,
) -> None:
    """Start MLflow's pages on this machine and print the address of the charts."""
    from distill import show

    show.ui(port)


@app.command(epilog="Example: distill sync run1")
def sync(
    names: Annotated[
        Optional[list[str]], typer.Argument(metavar="[RUN]...", help="Runs; all where absent.")
    ] = None,
) -> None:
    """Send to MLflow what it has not heard yet."""
    from distill import runs, tracking

    folders = [runs.find(name) for name in names] if names else runs.every()
    sent = [tracking.sync(folder, patient=True) for folder in folders]
    if not all(sent):
        raise UsageError(
            f"{sent.count(False)} of {len(sent)} runs could not be sent; is {tracking.public(tracking.uri())} reachable?"
        )
    typer.echo(f"{len(sent)} runs are on {tracking.public(tracking.uri())}")


@app.command(epilog="Example: distill doctor")
def doctor() -> None:
    """Check versions, devices, memory, disk, tracker and hub; say how to mend what is wrong."""
    from distill import show

    show.doctor()
