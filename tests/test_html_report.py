"""The report page: what it says about finished, unfinished and damaged runs, and that browsers show it."""

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from pi0.base.errors import MissingFileError
from pi0.base.files import write_json
from pi0.base.paths import REPO_ROOT
from pi0.base.video import write_video
from pi0.libero.evaluation import EvaluationResult
from pi0.report import page as report_page
from pi0.report.declaration import FILE, SUCCESS, Curve, Declaration, Metric, Plot, distribution
from pi0.report.figures import pooled
from pi0.report.html_report import write_html_report
from pi0.report.record import RunRecordError, read_run
from pi0.ript.config import AlgoConfig, Config, TrainingConfig, to_dict
from pi0.ript.metrics import METRICS
from pi0.ript.results import write_report
from pi0.training.metrics import append_line
from pi0.training.run_folder import new_run_dir
from tests.support.browser import browser_check, chromium
from tests.support.episodes import TASK, make_episode

TASKS = [
    "pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate",
    "pick_up_the_black_bowl_next_to_the_plate_and_place_it_on_the_plate",
]
HOSTILE = [
    "</title><script>document.title='hacked'</script>",
    "\"'><img src=x onerror=\"document.title='hacked'\"> & $\\frac$",
]
PROTOCOL = {"suite": "libero_spatial", "tasks": [3, 8], "horizon": 220, "assets": {"source": "standins"}}
PLANNED = 20


def step_metrics(step: int, tasks: list[str] = TASKS) -> dict:
    """A line of metrics.jsonl: 64 rollouts of one task."""
    successes = 20 + step % 40
    return {
        "step": step,
        "tasks": {tasks[step % len(tasks)]: [successes, 64]},
        "rollouts": 64,
        "successes": successes,
        "groups": 4,
        "unanimous_groups": step % 2,
        "dropped_groups": 1,
        "skipped_states": 3,
        "failed_rollouts": [],
        "lost_workers": [],
        "control_steps": 10028,
        "rollout_seconds": 26.5,
        "advantages": {"mean": 0.0, "std": 0.45, "min": -0.93, "max": 0.93, "positive": 0.6},
        "seconds": 63.2 + 40 * step,
        "loss": 0.1 * 0.97**step,
        "grad_norm": 0.55,
        "updates": 60,
        "lr": 3e-4,
        "phases": {
            "render": 9.1,
            "inference": 6.2,
            "physics": 10.3,
            "update": 13.5,
            "wait": 0.6,
            "other": 0.3,
        },
        "memory": {"rss_mb": 900.5 + step, "workers_mb": 760.0, "gpu_mb": None},
    }


def evaluation(successes: list[int], episodes: int = 50, tasks: list[str] = TASKS) -> EvaluationResult:
    """A result with so many successes of each task."""
    result = EvaluationResult([], PROTOCOL)
    for name, count in zip(tasks, successes, strict=True):
        for index in range(episodes):
            episode = make_episode(index < count, [10], seed=index, index=index).outline()
            episode.rollout = replace(episode.rollout, task=replace(TASK, name=name))
            episode.conditions = {"open drawer": index % 2 == 0, "on bowl plate": index < count}
            result.episodes.append(episode)
    return result


def start_run(folder: Path, name: str = "ript", steps: int = 0, tasks: list[str] = TASKS) -> Path:
    """What a run in progress has written."""
    config = Config(
        policy_path="checkpoints/pi0_tiny_libero_spatial",
        exp_name=name,
        algo=AlgoConfig(grad_norm_clip=1.0),
        training=TrainingConfig(num_train_steps=PLANNED),
    )
    run_dir = new_run_dir(str(folder), name, to_dict(config))
    write_json(run_dir / "protocol.json", PROTOCOL)
    METRICS.write(run_dir)
    for step in range(steps):
        append_line(run_dir / "metrics.jsonl", step_metrics(step, tasks))
    return run_dir


def finish_run(run_dir: Path, tasks: list[str] = TASKS) -> None:
    """What a run writes at its end: the scores before and after, and a video."""
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    before, after = evaluation([47, 13], tasks=tasks), evaluation([50, 43], tasks=tasks)
    write_report(run_dir, {}, before, after, history, seconds=595.9)
    random = np.random.default_rng(0)
    write_video(
        run_dir / "before_after.mp4", list(random.integers(0, 255, (8, 64, 128, 3), dtype=np.uint8)), 10
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with its report."""
    run_dir = start_run(tmp_path_factory.mktemp("finished"), steps=PLANNED)
    finish_run(run_dir)
    write_html_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run whose names and messages are HTML, and its report; $...$ would be a formula to the plots."""
    run_dir = start_run(tmp_path_factory.mktemp("hostile"), "<b>&\"q'", 4, HOSTILE)
    write_json(run_dir / "protocol.json", {**PROTOCOL, HOSTILE[0]: HOSTILE[1]})
    append_line(run_dir / "metrics.jsonl", {**step_metrics(4, HOSTILE), "lost_workers": HOSTILE})
    finish_run(run_dir, HOSTILE)
    (run_dir / "before_after.mp4").rename(run_dir / "<i>50% & \"q'.mp4")
    write_html_report(run_dir)
    return run_dir


class Page(HTMLParser):
    """A report taken apart: elements with their attributes, and what a reader sees."""

    def __init__(self, run_dir: Path):
        super().__init__()
        self.run_dir = run_dir
        self.source = (run_dir / "report.html").read_text()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.title = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] == ["title"]:
            self.title += data
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """The readable text, blanks as one."""
        return " ".join(" ".join(self.words).split())

    def tags(self, name: str) -> list[dict[str, str]]:
        """Attributes of every element of a kind."""
        return [attributes for tag, attributes in self.elements if tag == name]

    def plots(self) -> set[str]:
        """Names of the plots on the page."""
        return {attributes["id"] for attributes in self.tags("figure") if attributes.get("class") == "plot"}

    def outside_references(self) -> list[str]:
        """Everything the page would load or lead to that is not in it, in the folder, or data."""
        ids = {attributes["id"] for _, attributes in self.elements if "id" in attributes}
        loading = ("src", "href", "xlink:href", "poster", "srcset", "action", "data", "background")
        targets = [a[name] for _, a in self.elements for name in loading if name in a]
        targets += [
            url
            for _, a in self.elements
            for value in a.values()
            for url in re.findall(r"url\(([^)]*)\)", value)
        ]
        return [
            target
            for target in targets
            if not target.startswith("data:")
            and target.removeprefix("#") not in ids
            and not (self.run_dir / unquote(urlsplit(target).path)).is_file()
        ]


def test_a_finished_run_is_told_with_counts_intervals_and_the_paired_change(finished):
    page = Page(finished)
    assert page.title == f"{finished.name}: finished"
    assert "60/100 (60.0%, 95% interval 50.2 to 69.1)" in page.text
    assert "93/100 (93.0%, 95% interval 86.3 to 96.6)" in page.text
    assert "+33.0 points" in page.text
    assert "33 gained and 0 lost of 100" in page.text
    assert f"step {PLANNED} of {PLANNED}; 9 min 56 s in all" in page.text


def test_every_task_is_told_with_its_practice_and_its_scores(finished):
    rows = Page(finished).text
    for task, before, after in (
        (TASKS[0], "47/50 (94.0%) 83.8 to 97.9", "50/50 (100.0%)"),
        (TASKS[1], "13/50 (26.0%)", "43/50"),
    ):
        record = read_run(finished)
        practised, rollouts = record.success_counts(record.steps, task)
        assert rollouts == 640
        row = rows.split(task.replace("_", " ") + f" {practised}/{rollouts}")[1]
        assert before in row[:200] and after in row[:200]


def test_conditions_of_a_goal_follow_their_task(finished):
    of_tasks = Page(finished).text.split("– open drawer ")[1:]
    assert len(of_tasks) == len(TASKS)
    for told, before, after in zip(of_tasks, ("47/50", "13/50"), ("50/50", "43/50"), strict=True):
        drawer, bowl = told.split("– on bowl plate ")[:2]
        assert drawer.startswith("25/50 (50.0%) 36.6 to 63.4 25/50")
        assert bowl.startswith(before) and after in bowl[:50]


# Another trainer's metrics: scores of a game, without tasks, groups or evaluations.
GAME = Declaration(
    (Plot("learning_curve", "Score"), Plot("speed", "Speed"), Plot("losses", "Losses")),
    (
        Metric("step", "iteration", "number of the update", column="step"),
        Metric("seconds", "s", "wall time since the start", column="time", format="duration"),
        Metric("score", "points", "scores of the episodes that ended", "distribution",
               (Curve("learning_curve", "score of an episode", style="band"),),
               column="score", format=".1f", tile="Score of an episode"),
        Metric("episodes_per_hour", "episodes/hour", "of all workers", "sum", (Curve("speed", "episodes/hour"),),
               column="episodes/hour", format=".0f", tile="Speed"),
        Metric("lag", "updates", "age of the policy that acted", "max", (Curve("speed", "policy lag"),)),
        Metric("losses/policy", "", "clipped surrogate", curves=(Curve("losses", "loss", "policy"),)),
        Metric("losses/value", "", "squared error", curves=(Curve("losses", "loss", "value", scale=0.5),)),
        Metric("respawns", "lines", "workers that were replaced", "sum", column="respawns",
               trouble=("replaced: ", "no worker was replaced")),
    ),
    planned="ppo.updates",
)  # fmt: skip


def start_game(run_dir: Path, steps: int) -> Path:
    """What a run of another trainer has written."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("ppo: {updates: 40}")
    GAME.write(run_dir)
    random = np.random.default_rng(0)
    for step in range(steps):
        line = {
            "step": step,
            "seconds": 60.0 * (step + 1),
            "score": distribution(random.normal(20 + 3 * step, 10, 32).tolist()),
            "episodes_per_hour": 1900.0 + step,
            "lag": step % 3,
            "losses": {"policy": 0.1 / (step + 1), "value": 2.0 - 0.05 * step},
            "respawns": ["worker 3 was killed"] if step == 2 else [],
        }
        append_line(run_dir / "metrics.jsonl", line)
    return run_dir


def test_a_run_of_another_trainer_has_a_page_of_what_it_declared(tmp_path):
    run_dir = start_game(tmp_path / "game", 12)
    write_html_report(run_dir)
    page = Page(run_dir)
    assert page.title == "game: in progress, step 12 of 40"
    assert "about 28 min 00 s of training left" in page.text
    assert page.plots() == {"learning_curve", "speed", "losses"}
    assert (
        "Score of an episode, last 5 steps" in page.text
        and "Speed, last 5 steps 1909 episodes/hour; 1900 to 1911 in 12 steps" in page.text
    )
    assert "step time score episodes/hour respawns 11 12 min 00 s" in page.text
    assert "step 2: replaced: worker 3 was killed" in page.text
    curve, speed, losses = (svg["aria-label"] for svg in page.tags("svg"))
    assert curve.startswith("Score of an episode against training steps: last 5")
    assert "Policy lag against training steps: last 2, from 0 to 2." in speed
    assert (
        losses
        == "Loss against training steps: policy last 0.00833, from 0.00833 to 0.1; value last 0.725, from 0.725 to 1."
    )
    for word in ("success", "practice", "group", "rollout", "task"):
        assert word not in page.text.lower(), "nothing of RIPT's"
    short = start_game(tmp_path / "short", 2)
    write_html_report(short)
    assert "In 2 steps no worker was replaced." in Page(short).text


def test_another_trainers_evaluations_are_in_its_learning_curve_below_its_own_axis(tmp_path):
    run_dir = start_game(tmp_path / "game", 12)
    plots = (replace(GAME.plots[0], evaluations="levels never played"), *GAME.plots[1:])
    write_json(run_dir / "metrics.json", [{"step": 6, **evaluation([3, 4], 10).score()}])
    write_html_report(run_dir, replace(GAME, plots=plots))
    page = Page(run_dir)
    assert SUCCESS in page.source and "levels never played" in page.source
    assert "Evaluations: step 6: 7/20" in page.tags("svg")[0]["aria-label"]
    assert page.plots() == {"learning_curve", "success_by_task", "speed", "losses"}
    write_json(run_dir / "results.json", {"seconds": 720.0})
    write_html_report(run_dir)
    assert Page(run_dir).title == "game: finished"
    assert "levels never played" in Page(run_dir).source, (
        "the declaration that was given is kept in the folder"
    )


@pytest.mark.runs
def test_a_run_from_before_declarations_has_its_page_by_the_command_alone(finished, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.html", FILE))
    with pytest.raises(MissingFileError, match=f"{FILE} is missing"):
        write_html_report(run_dir)
    assert run_command(str(run_dir)).returncode == 0
    assert Page(run_dir).plots() == Page(finished).plots()
    (run_dir / FILE).write_text('{"metrics": [{"title": 1}]}')
    with pytest.raises(RunRecordError, match=f"{FILE} does not declare metrics .*; delete it"):
        write_html_report(run_dir)


def test_a_run_without_metrics_jsonl_has_a_learning_curve_of_the_history_in_its_results(finished):
    run_dir = start_run(finished.parent, "early")
    history = [step_metrics(step) for step in range(3)]
    write_report(run_dir, {}, evaluation([47, 13]), evaluation([50, 43]), history, seconds=1.0)
    assert not (run_dir / "metrics.jsonl").exists()
    ours, pages = run_dir / "learning_curve.png", finished / "plots" / "learning_curve.png"
    assert Image.open(ours).size == Image.open(pages).size, "one design"
    assert (finished / "learning_curve.png").read_bytes() == pages.read_bytes()


def test_no_training_process_loads_pyplot_with_its_windows_and_global_state():
    modules = (REPO_ROOT / "pi0").rglob("*.py")
    assert [path for path in modules if re.search(r"import .*pyplot", path.read_text())] == []


def test_a_page_has_every_plot_on_it_and_as_a_png_with_something_on_it(finished):
    plots = {"learning_curve", "success_by_task", "training", "advantages", "groups", "phases", "memory"}
    assert Page(finished).plots() == plots
    assert {path.name for path in (finished / "plots").iterdir()} == {f"{name}.png" for name in plots}
    for path in (finished / "plots").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] > 600 and pixels.std() > 10, path.name


def test_every_picture_and_video_has_a_text_for_those_who_do_not_see_it(finished):
    page = Page(finished)
    labels = [svg.get("aria-label", "") for svg in page.tags("svg")]
    assert len(labels) == len(page.plots())
    assert all(len(label) > 30 for label in labels)
    assert "Evaluations: before: 60/100" in labels[0]
    assert all(video["aria-label"] for video in page.tags("video"))


def test_configuration_protocol_and_machine_are_on_the_page(finished):
    text = Page(finished).text
    assert f"num_train_steps: {PLANNED}" in text
    assert "assets.source standins" in text
    assert "tasks 3, 8" in text
    assert "machine.cores" in text


@pytest.mark.parametrize("run", ["finished", "hostile"])
def test_a_page_needs_nothing_but_itself(run, request):
    page = Page(request.getfixturevalue(run))
    assert page.open == []
    assert page.outside_references() == []
    assert "http://" not in page.source and "https://" not in page.source
    assert not page.tags("script")


def test_a_small_video_is_in_the_page_byte_for_byte(finished):
    (video,) = Page(finished).tags("video")
    assert "controls" in video
    data = base64.b64decode(video["src"].removeprefix("data:video/mp4;base64,"))
    assert data == (finished / "before_after.mp4").read_bytes()


def test_videos_beyond_the_limit_are_linked_and_unfinished_ones_left_out(finished, tmp_path, monkeypatch):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    film = (run_dir / "before_after.mp4").read_bytes()
    (run_dir / "videos").mkdir()
    (run_dir / "videos" / "step 3 #1.mp4").write_bytes(film)
    (run_dir / "a_being_written.mp4").write_bytes(film[: film.index(b"moov")])
    monkeypatch.setattr(report_page, "EMBEDDED_VIDEO_BYTES", len(film))
    write_html_report(run_dir)
    page = Page(run_dir)
    assert [video["aria-label"] for video in page.tags("video")] == ["before_after.mp4"]
    (link,) = page.tags("a")
    assert (run_dir / unquote(urlsplit(link["href"]).path)).read_bytes() == film
    assert page.outside_references() == []


def test_a_run_in_progress_is_told_up_to_its_last_whole_line(tmp_path):
    run_dir = start_run(tmp_path, steps=7)
    last = json.dumps(step_metrics(7))
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(last[:60])
    write_html_report(run_dir)
    page = Page(run_dir)
    assert page.title == f"{run_dir.name}: in progress, step 7 of {PLANNED}"
    assert "about 8 min 40 s of training left" in page.text  # 13 steps of 40 s
    assert "Practice, last 5 steps" in page.text
    assert "120/320" in page.text
    assert "unreadable" not in page.text
    assert page.tags("progress") == [{"max": str(PLANNED), "value": "7"}]
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write(last[60:] + "\n")
    write_html_report(run_dir)
    assert f"step 8 of {PLANNED}" in Page(run_dir).title


def test_periodic_evaluations_are_told_from_the_first_to_the_latest(tmp_path):
    run_dir = start_run(tmp_path, steps=11)
    scores = [{"step": step, **evaluation([step, step], 10).score()} for step in (0, 5, 7, 10)]
    write_json(run_dir / "metrics.json", scores)
    write_html_report(run_dir)
    page = Page(run_dir)
    assert "Success, step 0" in page.text and "Success, step 10" in page.text
    assert "20/20 (100.0%, 95% interval 83.9 to 100.0)" in page.text
    assert "success_by_task" in page.plots()


def test_a_run_without_a_step_yet_says_so(tmp_path):
    run_dir = start_run(tmp_path)
    write_html_report(run_dir)
    page = Page(run_dir)
    assert "No step and no score has been recorded yet." in page.text
    assert page.title.endswith(f"in progress, step 0 of {PLANNED}")
    assert page.plots() == set()
    assert "assets.source standins" in page.text


def test_a_run_from_before_metrics_jsonl_is_told_by_the_history_in_its_results(finished, tmp_path):
    run_dir = shutil.copytree(
        finished, tmp_path / "old", ignore=shutil.ignore_patterns("metrics.jsonl", "plots")
    )
    (run_dir / "protocol.json").unlink()
    results = json.loads((run_dir / "results.json").read_text())
    newer = ("advantages", "lr", "phases", "memory", "lost_workers", "skipped_states")
    results["history"] = [{key: row[key] for key in row if key not in newer} for row in results["history"]]
    write_json(run_dir / "results.json", results)
    write_html_report(run_dir)
    page = Page(run_dir)
    assert page.plots() == {"learning_curve", "success_by_task", "training", "groups"}
    assert f"step {PLANNED} of {PLANNED}" in page.text
    assert "assets.source standins" in page.text
    assert "no rollout failed" in page.text
    assert "no worker was lost" not in page.text  # nobody looked


def test_losses_failures_and_unreadable_lines_are_named(tmp_path):
    run_dir = start_run(tmp_path, steps=2)
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "loss": 0.\n[1, 2]\n')  # a crash in the middle of a line, and no metrics
    trouble = {
        **step_metrics(2),
        "lost_workers": ["worker 1 died: killed by signal 9"],
        "failed_rollouts": ["libero_spatial task 3 state 7: diverged"],
    }
    append_line(run_dir / "metrics.jsonl", trouble)
    write_html_report(run_dir)
    text = Page(run_dir).text
    assert "step 2: worker 1 died: killed by signal 9" in text
    assert "step 2: failed, its group is left out: libero_spatial task 3 state 7: diverged" in text
    assert "metrics.jsonl, line 3: unreadable" in text and "metrics.jsonl, line 4: unreadable" in text


def test_runs_that_only_counted_failed_rollouts_have_a_report(tmp_path):
    run_dir = start_run(tmp_path, steps=2)
    append_line(run_dir / "metrics.jsonl", step_metrics(2) | {"failed_rollouts": 0})
    append_line(run_dir / "metrics.jsonl", step_metrics(3) | {"failed_rollouts": 2})
    write_html_report(run_dir)
    text = Page(run_dir).text
    assert text.count("step 3: failed, its group is left out: cause not recorded") == 2
    assert "step 2: failed" not in text


def test_a_step_run_again_after_a_resume_counts_once_as_it_went_last(tmp_path):
    run_dir = start_run(tmp_path, steps=3)
    append_line(run_dir / "metrics.jsonl", {**step_metrics(1), "successes": 64})
    record = read_run(run_dir)
    assert [row["step"] for row in record.steps] == [0, 1, 2]
    assert record.success_counts(record.steps) == (20 + 64 + 22, 3 * 64)


def test_nothing_but_the_step_is_needed_in_a_line(tmp_path):
    run_dir = start_run(tmp_path)
    for number, key in enumerate(step_metrics(0)):
        row = step_metrics(number)
        append_line(
            run_dir / "metrics.jsonl", {name: row[name] for name in row if name != key or key == "step"}
        )
    for section in ("advantages", "phases", "memory"):
        for key in step_metrics(0)[section]:
            number += 1
            row = step_metrics(number)
            append_line(run_dir / "metrics.jsonl", {**row, section: {**row[section], key: None}})
    append_line(run_dir / "metrics.jsonl", {"step": number + 1, "loss": float("nan"), "tasks": {}})
    append_line(run_dir / "metrics.jsonl", {"step": number + 2})
    write_html_report(run_dir)
    assert f"step {number + 3} of" in Page(run_dir).title
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    write_html_report(run_dir)
    assert "step 1 of" in Page(run_dir).title


def test_names_that_are_html_are_text(hostile):
    page = Page(hostile)
    assert page.title == f"{hostile.name}: finished"
    for name in HOSTILE:
        assert name.replace("_", " ") in page.text
        assert f"step 4: {name}" in page.text
    assert f"{HOSTILE[0]} {HOSTILE[1]}" in page.text  # in the protocol
    assert not page.tags("img") and not page.tags("b") and not page.tags("i")
    assert [video["aria-label"] for video in page.tags("video")] == ["<i>50% & \"q'.mp4"]


def test_an_open_report_stays_whole_while_it_is_written_again(tmp_path):
    run_dir = start_run(tmp_path, steps=2)
    page, plot = write_html_report(run_dir), run_dir / "plots" / "training.png"
    first = page.read_bytes(), plot.read_bytes()
    with page.open("rb") as open_page, plot.open("rb") as open_plot:
        append_line(run_dir / "metrics.jsonl", step_metrics(2))
        write_html_report(run_dir)
        assert (open_page.read(), open_plot.read()) == first
    assert page.read_bytes() != first[0] and plot.read_bytes() != first[1]
    assert not list(run_dir.rglob("*.tmp"))


def test_the_report_of_a_long_run_stays_small(tmp_path):
    run_dir = start_run(tmp_path, tasks=TASKS)
    tasks = [f"task_{number}_with_a_name_of_about_the_usual_length_in_libero" for number in range(10)]
    with (run_dir / "metrics.jsonl").open("w") as metrics:
        metrics.writelines(json.dumps(step_metrics(step, tasks)) + "\n" for step in range(1000))
    write_html_report(run_dir)
    page = Page(run_dir)
    assert "practice_by_task" in page.plots()
    assert len(page.source) < 1e6


def test_pooling_keeps_every_step():
    for count in (1, 59, 60, 61, 1000):
        rows = [{"step": step} for step in range(count)]
        places, chunks = pooled(rows)
        assert [row for chunk in chunks for row in chunk] == rows
        assert len(places) == len(chunks) <= 60
        assert places[0] == (len(chunks[0])) / 2  # the first chunk lies between 0 and the steps in it


def test_what_is_no_run_is_refused_with_its_name(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere: there is no such folder"):
        write_html_report(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="neither config.yaml nor metrics.jsonl"):
        write_html_report(tmp_path)
    run_dir = start_run(tmp_path, steps=1)
    (run_dir / "results.json").write_text('{"before": ')
    with pytest.raises(RunRecordError, match=r"results\.json is not JSON"):
        write_html_report(run_dir)


@pytest.mark.runs
def test_the_command_writes_the_page_or_says_what_is_wrong(finished, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    done = run_command(str(run_dir))
    assert done.stdout == f"written to {run_dir / 'report.html'}\n", done.stderr
    assert Page(run_dir).title == "run: finished"
    refused = run_command(str(tmp_path / "nowhere"))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pi0.report", *arguments]
    return subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.soak
@pytest.mark.parametrize("width", [1200, 400])
def test_chromium_shows_every_plot_and_video_within_the_window(finished, tmp_path, width):
    seen = browser_check(finished, tmp_path, width)
    assert seen["failures"] == []
    assert seen["broken_images"] == 0 and seen["dangling"] == 0
    assert seen["video_widths"] == [128]
    assert seen["plots"] == 7
    assert len(seen["text_colours"]) == 1  # plots follow the light or dark scheme as words do
    assert seen["window_width"] == seen["content_width"] == width
    assert "93/100 (93.0%, 95% interval 86.3 to 96.6)" in seen["text"]
    assert "pick up the black bowl next to the plate" in seen["text"]


@pytest.mark.soak
def test_chromium_runs_nothing_that_hides_in_a_name(hostile, tmp_path):
    seen = browser_check(hostile, tmp_path, 1200)
    assert seen["title"] == f"{hostile.name}: finished"
    assert seen["failures"] == [] and seen["broken_images"] == 0


@pytest.mark.soak
def test_chromium_draws_the_page_light_and_dark_without_a_complaint(finished, tmp_path):
    brightness = {}
    for scheme, value in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        done = chromium(
            tmp_path / scheme,
            finished / "report.html",
            f"--screenshot={picture}",
            "--window-size=1200,2400",
            f"--blink-settings=preferredColorScheme={value}",
        )
        assert "CONSOLE" not in done.stderr
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels.shape == (2400, 1200, 3)
        assert len(np.unique(pixels[::3, ::3] @ (65536, 256, 1))) > 200  # colours
        brightness[scheme] = pixels.mean()
    assert brightness["dark"] < 80 and brightness["light"] > 200
