"""tests/reproduce.py: verdicts, claims, entries, saved rows and tables, and what it does with runs that were cut off."""

import importlib
import json
import math
import re
import shutil
import sys

import claims
import pytest
import report
import reproduce
import tyro
from claims import (
    Row,
    Seed,
    UserError,
    at,
    correlation,
    exponent,
    higher,
    improvement,
    judge,
    lead,
    mean,
    plateau,
    rises,
    sweep,
    weakest,
    within,
    without_worst,
)
from reproduce import ROWS

PRESETS = ("laptop", "thesis")
ENTRIES = [(name, preset) for name in ROWS for preset in PRESETS]


def row(learner, step, mean, task="mnist", metric="accuracy", novelty="task", **more):
    return dict(learner=learner, task=task, novelty=novelty, metric=metric, step=step, mean=mean, std=0.1, seeds=4) | more


def seed(*rows, **facts):
    return Seed({"": {"results": list(rows)} | facts})


# ---- verdicts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([1.0, 1.1, 0.9], "reproduced"),
        ([1.0, -1.0, 0.3], "as far as it goes"),  # 0.1 with a standard error of 0.59
        ([-1.0, -1.1, 0.9], "not reproduced"),
        ([0.0, 0.0, 0.0], "not reproduced"),
        ([math.nan, 1.0, 1.0], "not reproduced"),
        ([1.0, 1.0], "as far as it goes"),  # fewer than three seeds, whatever the difference
        ([100.0], "as far as it goes"),
    ],
)
def test_a_difference_is_judged_by_its_standard_error_over_seeds(differences, verdict):
    assert judge(differences)[2] == verdict


def test_the_standard_error_and_its_threshold():
    difference, error, _ = judge([2.0, 4.0, 6.0, 8.0])
    assert difference == 5 and error == pytest.approx(math.sqrt(20 / 3) / 2)
    spread = math.sqrt(3) / 2  # three seeds at 1 - d, 1, 1 + d have a standard error of d / sqrt(3)
    assert judge([1 - 0.99 * spread, 1, 1 + 0.99 * spread])[2] == "reproduced"
    assert judge([1 - 1.01 * spread, 1, 1 + 1.01 * spread])[2] == "as far as it goes"
    assert judge([1.0], enough=1) == (1.0, 0.0, "reproduced")


def test_an_entry_is_worth_its_weakest_claim():
    claims = [at("vsml", "mnist") > 0.5, at("vsml", "mnist") > 0.7, at("rnn", "mnist") > 0.5]
    good, bad, missing = (claim.check([seed(row("vsml", 1, 0.6))] * 3) for claim in claims)
    assert [one.verdict for one in (good, bad, missing)] == ["reproduced", "not reproduced", "not run"]
    assert weakest([good, good]) == "reproduced"
    assert weakest([good, bad]) == weakest([missing, bad]) == "not reproduced"
    assert weakest([good, missing]) == "as far as it goes"
    assert weakest([missing]) == weakest([]) == "not run"


# ---- claims ------------------------------------------------------------------------------------------------------------
def test_a_number_is_the_first_row_from_a_step_on():
    one = seed(row("vsml", 1, 0.1), row("vsml", 10, 0.5), row("vsml", 100, 0.8), row("vsml", 5, 3.0, metric="loss"))
    values = [at("vsml", "mnist", step).of(one) for step in (0, 2, 10, None)]
    assert values == [0.1, 0.5, 0.5, 0.8]
    assert at("vsml", "mnist", metric="loss").of(one) == 3.0
    assert at("vsml", "mnist", field="std").of(one) == 0.1
    assert ("", "mnist", "task", "accuracy", 10) in one.used
    with pytest.raises(LookupError):
        at("vsml", "mnist", 101).of(one)


def test_novelty_separates_tasks_of_one_name():
    one = seed(row("gpicl", 1, 0.9, novelty="none"), row("gpicl", 1, 0.2))
    assert at("gpicl", "mnist", novelty="none").of(one) == 0.9
    assert at("gpicl", "mnist", novelty="task").of(one) == 0.2


def test_claims_compare_numbers_of_the_same_seed():
    seeds = [seed(row("a", 1, 0.1), row("a", 9, 0.3 + n), row("b", 9, 0.2 + n)) for n in range(3)]
    (claim,) = higher("a", ["b"], ["mnist"])
    outcome = claim.check(seeds)
    assert outcome.difference == pytest.approx(0.1) and outcome.error == pytest.approx(0)
    assert outcome.left == pytest.approx(1.3) and outcome.right == pytest.approx(1.2)
    assert outcome.seeds == 3 and outcome.verdict == "reproduced"

    a, b = at("a", "mnist"), at("b", "mnist")
    assert (b > a).check(seeds).verdict == (a < b).check(seeds).verdict == "not reproduced"
    assert (a - b + 1).of(seeds[0]) == pytest.approx(1.1) and (a * 2).of(seeds[0]) == pytest.approx(0.6)
    assert mean("both", [a, b]).of(seeds[0]) == pytest.approx(0.25)
    assert rises("a", ["mnist"])[0].check(seeds).difference == pytest.approx(1.2)
    assert [one.check(seeds).verdict for one in within(a, b, 0.2)] == ["reproduced"] * 2
    assert [one.check(seeds).verdict for one in within(a, b, 0.05)] == ["reproduced", "not reproduced"]


def test_numbers_that_are_made_of_more_than_a_row():
    curves = {"step": [0.0, 100.0, 200.0]}
    runs = {f"batch {n}": {"results": [], "plateau": round(1e6 * n**-0.5), "curves": curves} for n in (16, 32, 64)}
    batches = {n: f"batch {n}" for n in (16, 32, 64)}
    assert exponent("plateau", batches).of(Seed(runs)) == pytest.approx(-0.5, abs=1e-3)
    assert exponent("tasks", batches, tasks=True).of(Seed(runs)) == pytest.approx(0.5, abs=1e-3)
    assert plateau("").of(seed(plateau=None, curves=curves)) == 200

    labels = [f"learner lstm, width {width}" for width in (1, 10, 100)]
    runs = {
        label: {"results": [row("lstm", 1, 0.1 * n)], "state_size": 10**n, "parameters": 10 ** ((n + 1) % 3)}
        for n, label in enumerate(labels)
    }
    assert correlation("state_size", labels, "mnist").of(Seed(runs)) == pytest.approx(1)
    assert correlation("parameters", labels, "mnist").of(Seed(runs)) == pytest.approx(-0.5)

    returns = [row("symla", step, mean, metric="return") for step, mean in ((1, -1.0), (13, -4.0), (25, -6.0))]
    assert improvement("symla", "mnist", "").of(seed(*returns)) == 2  # -4 in the first half, -2 in the second

    facts = {"achieved": {"bandit random_search": {"difference": 0.2, "low": -0.1, "high": 0.3}}}
    compared = seed(differences=facts)
    assert lead("random_search", "bandit").of(compared) == 0.2 and lead("random_search", "bandit", "low").of(compared) == -0.1
    agents = Seed({"each": {"results": [row("metagenrl", 9, 5, values=[-100.0, 1.0, 3.0])]}})
    assert without_worst("mnist", "each").of(agents) == 1


# ---- entries -----------------------------------------------------------------------------------------------------------
def test_every_experiment_of_the_thesis_has_an_entry():
    """G13 and F4 are not of the thesis; V11 and G12 are one of its experiments, and L5 to L7 are L1 to L3 on a body."""
    counts = {"M": 7, "V": 11, "S": 5, "G": 13, "L": 7, "F": 4}
    assert list(ROWS) == [f"{letter}{number}" for letter, count in counts.items() for number in range(1, count + 1)]
    assert all(row.figure and row.claim and row.claims_at(preset) for row in ROWS.values() for preset in PRESETS)


def parsed(command, preset, cache={}):  # noqa: B006 (remembers what was parsed)
    """The Args of a command, over the preset's values as the script takes them; None for a test."""
    script, *flags = command.split()
    if script == "pytest":
        return None
    module = importlib.import_module(script.removesuffix(".py"))
    if "--preset" in flags:
        preset = flags[flags.index("--preset") + 1]
    key = (preset, re.sub(r"\d+(\.\d+)?", "0", command))  # commands that differ in numbers alone need not be parsed twice
    if key not in cache or "gaps" in command:
        cache[key] = tyro.cli(module.Args, default=module.Args(**module.PRESETS[preset]), args=flags, console_outputs=False)
    return cache[key]


def resolved(name, index, preset):
    command = reproduce.command_of(name, index, preset)
    alias = re.match(reproduce.SAME_RUN, command)
    return resolved(*alias.groups(), preset) if alias else command


METRICS = {
    "vsml": ("accuracy", "cumulative_accuracy", "cross_entropy"),
    "gpicl": ("accuracy", "cumulative_accuracy", "cross_entropy"),
    "symla": ("return", "cumulative_regret"),
    "gla": ("speed",),
    "fme": ("child_better",),
}  # that claims name


class Named(Seed):
    """A seed that has every row that could exist, and refuses the others."""

    def __init__(self, name, preset):
        self.name, self.used = name, set()
        labels = ROWS[name].commands(preset)
        self.args = {label: parsed(resolved(name, number, preset), preset) for number, label in enumerate(labels)}
        self.commands = {label: resolved(name, number, preset) for number, label in enumerate(labels)}

    def row(self, learner, task, step, run, metric, novelty):
        args, command = self.args[run], self.commands[run]
        if args:
            base, _, extra = learner.partition(", ")
            assert base in {args.learner, *args.baselines}, f"{learner} is not in: {command}"
            assert "%" not in extra or args.progress, f"{learner} is not in: {command}"
            assert "g =" not in extra or int(extra[4:]) in args.gaps[1:], f"{learner} is not in: {command}"
            known = {*getattr(args, "envs", ()), *getattr(args, "test_envs", ()), *getattr(args, "test_datasets", ())}
            if command.startswith("symla.py") and not args.test_envs:
                known |= {env for name in args.envs for env in importlib.import_module("symla").beside(name)}
            inherited = "--mode test" in command or "--learner epg" in command
            assert inherited or task in known or re.split("[@ ]", task)[0] in known, f"{task} is not in: {command}"
            assert metric is None or metric in METRICS[args.__module__], f"there is no {metric} in: {command}"
            seen = args.__module__ == "gpicl" and task in args.dataset
            assert novelty is None or novelty in (("none", "task") if seen else ("domain",)), f"{novelty} {task}: {command}"
        return {"mean": len(run) + len(task) + len(learner), "std": 1.0, "step": step or 50, "values": [1.0, 2.0, 4.0]}

    def columns(self, run):
        return list(self.curves(run))

    def curve(self, run, column):
        return self.curves(run)[column]

    def curves(self, run):
        curves = {"step": [0.0, 10.0, 90.0], "transformer_loss_unseen": [2.3, 2.4, 1.0]}
        logged = ["distance", "update norm all", "update cosine all", "gradient cosine all"]
        logged += [f"gradient norm {tensor}" for tensor in ("head.weight", "other", "all")]
        curves |= {f"transformer {column}": [1.0] * 40 for column in logged}
        rewards = [f"{env}_{name}" for env in getattr(self.args[run], "envs", ()) for name in ("reward", "reward_std")]
        return curves | {column: [1.0, 2.0, 2.0] for column in rewards}

    def fact(self, run, name):
        facts = {"plateau": 50, "final_loss": 1.0, "error": 0.1, "repeats": {"vsml": 1.0, "adam": 0.0, "sgd": 0.0}}
        facts |= {"state_size": len(run) ** 2, "parameters": len(run)}
        assert run in self.commands
        if self.commands[run].startswith("fme.py"):
            args = self.args[run]
            learners = [args.learner, *args.baselines, "fme_frozen"]
            jobs = [f"{env} {learner}" for env in args.envs for learner in learners]
            facts["after_swap"] = {learner: [0.1] * 10 for learner in learners}
            facts["differences"] = {what: {job: dict(difference=1, low=1, high=1) for job in jobs} for what in ("achieved", "until_solved")}
        return facts[name]


@pytest.mark.parametrize("name, preset", ENTRIES, ids=lambda value: value)
def test_the_commands_of_an_entry_parse_and_leave_the_rows_that_its_claims_name(name, preset):
    one = Named(name, preset)
    for claim in ROWS[name].claims_at(preset):
        for side in (claim.left, claim.right):
            assert isinstance(side.of(one), (int, float)), side.words
    for figure in ROWS[name].figures(preset):
        assert figure.points(one), figure.name


CHAPTER_6 = {  # entry and command: environments, others to test in, projected, smallest gap, meta-test seeds
    ("L1", 1): (("ant",), (), False, 0, 64),
    ("L2", 0): (("ant:0", "ant:180"), (), False, 60, 64),
    ("L3", 0): (("ant",), ("Reacher-v4", "half_cheetah", "dm_cartpole_swing_up"), True, 0, 32),
    ("L4", 0): (("ant",), ("Reacher-v4", "half_cheetah", "dm_cartpole_swing_up"), True, 0, 32),
}


@pytest.mark.parametrize("name, index", CHAPTER_6)
def test_the_thesis_commands_of_gla_have_the_numbers_of_chapter_6(name, index):
    args = parsed(resolved(name, index, "thesis"), "thesis")
    numbers = (args.envs, args.test_envs, args.projected, min(args.gaps), args.test_seeds)
    assert numbers == CHAPTER_6[name, index]
    assert (args.obs_size, args.action_size) == (64, 16) and {"no-reward", "cloning"} <= {*args.baselines}


def test_a_sweep_has_a_command_for_each_combination():
    assert sweep("x.py --a", num_tasks=[1, 2], learner=["outer_lstm"]) == {
        "num_tasks 1, learner outer_lstm": "x.py --a --num-tasks 1 --learner outer_lstm",
        "num_tasks 2, learner outer_lstm": "x.py --a --num-tasks 2 --learner outer_lstm",
    }


def test_the_theorem_is_a_test_that_exists():
    path, _, test = ROWS["V10"].laptop.split()[1].partition("::")
    assert f"def {test}(" in (report.ROOT / path).read_text()


# ---- saved rows and tables ---------------------------------------------------------------------------------------------
def test_the_committed_tables_are_what_the_saved_rows_give():
    for path, text in report.tables(ROWS).items():
        assert path.read_text() == text, f"python tests/reproduce.py --tables changes {path}"


@pytest.mark.parametrize("path", sorted((report.PAGES / "rows").glob("*.json")), ids=lambda path: path.stem)
def test_saved_rows_are_small_and_belong_to_an_entry(path):
    name, preset = path.stem.split("-")
    assert path.stat().st_size < 200_000
    assert name in ROWS and preset in PRESETS
    assert any(outcome.verdict != "not run" for outcome in report.checked(name, ROWS[name], preset)[2])


# ---- runs --------------------------------------------------------------------------------------------------------------
SCRIPT = """
import json, os, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags.get("--resume") or pathlib.Path(flags["--run-dir"], flags["--run-name"]))
with open("calls.txt", "a") as file:
    print(*sys.argv[1:], file=file)
stop = pathlib.Path("stop.txt")
if stop.exists() and stop.read_text() == "until all have started":
    late = time.time() + 60
    while len(open("calls.txt").readlines()) < 3 and time.time() < late:
        time.sleep(0.01)
    print(os.environ["OMP_NUM_THREADS"])
    stop = pathlib.Path("no.txt") if time.time() < late else stop
if "--resume" not in flags:
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text("{}")
    if stop.exists() and stop.read_text() == "early":
        sys.exit(1)
    (folder / "checkpoint.pt").write_text("")
    if stop.exists():
        sys.exit(1)
mean = 1.0 + float(flags.get("--seed", 0))
row = dict(learner="a", task="t", novelty="none", metric="m", step=1, mean=mean, std=0.0, seeds=1)
other = dict(row, metric="other")
(folder / "metrics.csv").write_text("step,loss\\n" + "".join(f"{n},{n / 3}\\n" for n in range(100)))
results = {"device": "here", "seconds": {"meta_train": 60.0}, "results": [row, other]}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A repository with one script that can be stopped, and two entries, of which one uses the other's run."""
    (tmp_path / "fake.py").write_text(SCRIPT)
    pages = tmp_path / "pages"
    for module in (reproduce, report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGES", pages)
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs" / "reproduce")
    rows = {
        "V1": Row("Fig. 1", "grows", "fake.py --flag 1", [at("a", "t") > 0]),
        "V2": Row("Fig. 2", "uses it", {"": "V1.0", "x": "fake.py --from {V1.0}/checkpoint.pt"}, [at("a", "t", run="x") > 0]),
    }
    monkeypatch.setattr(reproduce, "ROWS", rows)
    pages.mkdir()
    for name in ("status", *report.SCRIPTS.values()):
        path = tmp_path / "README.md" if name == "status" else pages / f"{name}.md"
        path.write_text(f"Before.\n\n<!-- reproduce:{name} begin --><!-- reproduce:{name} end -->\n\nAfter.\n")
    return tmp_path


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines()


def run(name="V1", seeds=1):
    reproduce.run_entry(name, "laptop", seeds, report.ROOT / "data")


def test_a_finished_run_is_used_again_and_a_cut_off_one_resumed(fake):
    (fake / "stop.txt").write_text("late")
    with pytest.raises(UserError, match="exit code 1"):
        run()
    assert not report.saved_path("V1", "laptop").exists()

    run()
    run()
    folder = fake / "runs" / "reproduce" / "V1-0-s0"
    assert len(calls(fake)) == 2 and calls(fake)[1] == f"--resume {folder}"
    assert "--flag 1 --preset laptop --seed 0" in calls(fake)[0]


def test_a_run_that_was_cut_off_before_its_first_checkpoint_starts_anew(fake):
    (fake / "stop.txt").write_text("early")
    with pytest.raises(UserError):
        run()
    (fake / "stop.txt").unlink()
    run()
    assert calls(fake)[0] == calls(fake)[1]


def test_a_run_of_another_command_is_not_used(fake):
    run()
    reproduce.ROWS["V1"] = reproduce.ROWS["V1"]._replace(laptop="fake.py --flag 2")
    with pytest.raises(UserError, match="another command"):
        run()


def test_a_run_whose_command_is_not_known_is_not_used(fake):
    run()
    (fake / "runs" / "reproduce" / "V1-0-s0.txt").unlink()
    with pytest.raises(UserError, match="another command"):
        run()


def test_rows_of_more_seeds_are_not_overwritten(fake):
    run(seeds=3)
    with pytest.raises(UserError, match="3 seeds are saved"):
        run(seeds=1)
    assert len(json.loads(report.saved_path("V1", "laptop").read_text())["seeds"]) == 3
    reproduce.ROWS["V1"] = reproduce.ROWS["V1"]._replace(laptop="fake.py --flag 2")
    shutil.rmtree(fake / "runs")
    run(seeds=1)
    assert len(json.loads(report.saved_path("V1", "laptop").read_text())["seeds"]) == 1


def test_a_test_that_cannot_start_has_no_verdict(fake):
    reproduce.ROWS["V1"] = Row("Theorem", "holds", "pytest missing.py", [at("pytest", "test") > 0.5], enough_seeds=1)
    with pytest.raises(UserError, match="exit code 4"):
        run()
    assert not report.saved_path("V1", "laptop").exists()


def test_curves_end_with_the_last_line_and_damaged_cells_are_missing(fake):
    run()
    folder = fake / "runs" / "reproduce" / "V1-0-s0"
    assert reproduce.read_run(folder)["curves"]["step"] == [*range(0, 99, 3), 99]
    with open(folder / "metrics.csv", "ab") as file:
        file.write(b"100,\xff\n")
    curves = reproduce.read_run(folder)["curves"]
    assert curves["step"][-1] == 100 and curves["loss"][-1] is None
    (folder / "results.json").write_text("null")
    with pytest.raises(UserError, match="damaged"):
        reproduce.read_run(folder)


def test_an_entry_uses_runs_of_others_with_the_same_seed(fake):
    run("V2", seeds=3)
    assert len(calls(fake)) == 6  # of each seed one of V1 and one of V2
    assert "V1-0-s2/checkpoint.pt" in calls(fake)[5] and "--seed 2" in calls(fake)[5]
    saved = json.loads(report.saved_path("V2", "laptop").read_text())
    assert saved["commands"] == {"": "fake.py --flag 1", "x": "fake.py --from runs/reproduce/V1-0-s0/checkpoint.pt"}


def test_runs_side_by_side(fake, monkeypatch, capsys):
    """Each is executed once, also if two entries need it, and beside the others."""
    (fake / "stop.txt").write_text("until all have started")
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "V1", "V2", "--preset", "laptop", "--jobs", "3"])
    reproduce.main()
    assert capsys.readouterr().out.count("The thesis:") == 2
    assert len(calls(fake)) == 6 and len({line.split("--run-name")[1] for line in calls(fake)}) == 6
    assert not any("--from" in line for line in calls(fake)[:3])  # those that others start from come first
    assert (fake / "runs" / "reproduce" / "V1-0-s2.log").read_text() == "2\n"


def test_of_runs_side_by_side_one_may_fail(fake, monkeypatch, capsys):
    reproduce.ROWS["V2"] = Row("Fig. 2", "fails", "missing.py", [at("a", "t") > 0])
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "V2", "V1", "--preset", "laptop", "--jobs", "2"])
    with pytest.raises(UserError, match=r"V2: .*exit code 2; its reason is in .*V2-0-s0.log"):
        reproduce.main()
    assert "V1 (Fig. 1), laptop preset: reproduced" in capsys.readouterr().out


def test_saved_rows_hold_what_claims_use_and_make_the_tables(fake, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "V1", "--preset", "laptop"])
    reproduce.main()
    assert "reproduced" in capsys.readouterr().out
    saved = json.loads(report.saved_path("V1", "laptop").read_text())
    assert [run[0]["results"] for run in saved["seeds"].values()] == [
        [["a", "t", "none", "m", 1, n, 0.0, 1]] for n in (1.0, 2.0, 3.0)
    ]
    status = (fake / "README.md").read_text()
    assert status.startswith("Before.") and status.endswith("After.\n")
    assert "| Fig. 1 | [`V1`](.github/results/vsml.md#v1) | reproduced | 2 vs 0 (1/1) | grows |" in status
    assert "| Fig. 2 | [`V2`](.github/results/vsml.md#earlier-runs) | earlier run |" in status
    page = (fake / "pages" / "vsml.md").read_text()
    assert "| a, t > 0 | 2 | 0 | 2 ± 0.577 | reproduced |" in page and "about a minute a seed" in page
    assert all(path.read_text() == text for path, text in report.tables(reproduce.ROWS).items())


def test_the_table_shows_a_claim_about_the_method_rather_than_one_about_baselines(fake):
    method, baseline = at("a", "t") > 3, at("b", "t") > 9
    reproduce.ROWS["V1"] = row = Row("Fig. 1", "grows", "fake.py", [method, baseline._replace(of_baseline=True)])
    results = [[learner, "t", "none", "m", 1, 2.0, 0.0, 1] for learner in "ab"]
    runs = {seed: [{"device": "CPU", "seconds": 0, "facts": {}, "results": results}] for seed in "012"}
    commands = {"": "fake.py --checkpoint runs/reproduce/V1-0-s0/checkpoint.pt"}
    entry = {"commands": commands, "claims": [method.words, baseline.words], "torch": "2", "seeds": runs}
    report.save("V1", "laptop", entry)
    assert report.status("V1", row) == ("not reproduced", "2 vs 3 (0/1)")
    assert "runs/reproduce/V1-0-sSEED/checkpoint.pt" in report.section("V1", row, "laptop")


@pytest.mark.parametrize("code, verdict, cell", [(0.0, "not reproduced", "test fails"), (1.0, "reproduced", "test passes")])
def test_a_claim_that_is_a_test_has_words_instead_of_numbers(fake, code, verdict, cell):
    passed = at("pytest", "test") > 0.5
    reproduce.ROWS["V1"] = row = Row("Theorem", "holds", "pytest tests/test_a.py", [passed], enough_seeds=1)
    one = {"device": "CPU", "seconds": 0, "facts": {}, "results": [["pytest", "test", "none", "passed", 1, code, 0.0, 1]]}
    entry = {"commands": {"": row.laptop}, "claims": [passed.words], "torch": "2", "seeds": {"0": [one]}}
    report.save("V1", "laptop", entry)
    assert report.status("V1", row) == (verdict, cell)
    section = report.section("V1", row, "laptop")
    assert "python -m pytest tests/test_a.py" in section and " vs " not in section and "0.5" not in section
    report.save("V1", "laptop", entry | {"claims": []})
    assert report.status("V1", row)[0] == "not run"  # the claim is newer than the rows


def test_the_figure_is_drawn_from_saved_rows_and_from_earlier_figures(fake, monkeypatch):
    import matplotlib.pyplot as plt

    run()
    reproduce.ROWS["M1"] = reproduce.ROWS["V1"]
    plt.imsave(report.PAGES / "old.png", [[0.0, 1.0], [1.0, 0.0]])
    strip = {"One": ("V1", "t", False, "old.png", (0, 0, 2, 2)), "Two": ("M1", "t", True, "old.png", (0, 0, 2, 2))}
    monkeypatch.setattr(report, "STRIP", strip)
    report.draw_strip(reproduce.ROWS)
    assert plt.imread(report.PAGES / "strip.png").shape[:2] == (260, 580)


@pytest.mark.parametrize("matrix", [False, True])
def test_a_figure_over_the_runs_of_an_entry(matrix, tmp_path, monkeypatch):
    """Points of each seed; those whose rows are missing are left out."""

    def seed(mean):
        row = dict(zip(claims.KEYS, ("a", "t", "task", "accuracy", 5, mean, 0.1, 3), strict=False))
        return claims.Seed({run: {"results": [row], "size": 7} for run in ("x 1", "x 2")})

    lines = {"a": [(x, claims.at("a", "t", run=f"x {x}")) for x in (1, 2)], "b": [(1, claims.at("b", "t", run="x 1"))]}
    sizes = {"a": [(claims.fact("x 1", "size"), claims.at("a", "t", run="x 1"))]}
    figure = claims.Figure("drawn", "x", "accuracy", {"lines": lines, "sizes": sizes}, matrix=matrix)
    one = seed(0.5)
    points = figure.points(one)
    assert points == [("lines", "a", 1, 0.5), ("lines", "a", 2, 0.5), ("sizes", "a", 7, 0.5)]
    assert ("x 1", "size") in one.used and ("x 2", "t", "task", "accuracy", 5) in one.used
    monkeypatch.setattr(report, "PAGES", tmp_path)
    report.draw(figure, [points, figure.points(seed(0.7))])
    assert (tmp_path / "drawn.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, sentence",
    [("Z9", "there is no entry Z9"), ("V1 --seeds 0", "--seeds and --jobs have to be"), ("V1 --check --preset laptop", "no saved rows")],
)
def test_a_mistake_of_the_user_is_one_sentence(fake, monkeypatch, flags, sentence):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags.split()])
    with pytest.raises(UserError, match=sentence):
        reproduce.main()


def test_damaged_rows_and_pages_without_markers_are_refused(fake):
    run()
    saved = json.loads(report.saved_path("V1", "laptop").read_text())
    short = saved | {"seeds": {"0": [saved["seeds"]["0"][0] | {"results": [["a", "t"]]}]}}
    others = [json.dumps(x) for x in ([], None, saved | {"seeds": []}, saved | {"claims": None}, short)]
    contents = [("{", "damaged"), *((text, "of another version") for text in ('{"commands": {}, "seeds": {}}', *others))]
    for content, sentence in contents:
        report.saved_path("V1", "laptop").write_text(content)
        with pytest.raises(UserError, match=sentence):
            report.tables(reproduce.ROWS)
    report.saved_path("V1", "laptop").unlink()
    (fake / "README.md").write_text("no markers")
    with pytest.raises(UserError, match="no markers for its table"):
        report.tables(reproduce.ROWS)
