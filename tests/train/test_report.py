"""A run's page: its numbers are the files', of any length, in any state; and a reader can go through it."""

import errno
import json
import math
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax import launch
from mixtral_jax.train.report import command, experts, history, run, serve, thin
from mixtral_jax.train.run.directory import RunDirectory
from tests.sources import ROOT
from tests.train.test_pages import NASTY, SHOWN, Reader, tip

NAN, INF = math.nan, math.inf


def write_run(place: Path, lines: list[dict[str, Any]], **files: str) -> Path:
    """A run's directory of these lines of metrics.jsonl; `files` by name, with __ for a slash and _ for the dot."""
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in files.items():
        file = place / name.replace("__", "/").replace("_json", ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return place


def metrics(steps: int, tokens: int = 10, **more: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(steps)
    return [
        {"step": step, "time": 1e9 + 60 * step, "attempt": 1, "train/tokens": tokens * step,
         "train/loss": 1 + float(rng.random()), "train/grad_norm": float(rng.random()), **more}
        for step in range(1, steps + 1)
    ]  # fmt: skip


def page_of(*runs: Path, **options: Any) -> str:
    out = runs[0].parent / "page.html"
    command.report([*map(str, runs)], **{"out": str(out), "watch": False, "port": 0, "smooth": 1} | options)
    return out.read_text()


def chart(html: str, title: str) -> dict[str, Any]:
    """The series of a chart by name, each as {kind of x or y: values}."""
    *charts, axes = Reader(html).data()
    (found,) = (data for data in charts if data.get("title") == title and "series" in data)
    return {one["name"]: {**axes[one["axis"]], **one} for one in found["series"]}


def five_digits(values: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def test_a_short_run_is_shown_number_by_number(tmp_path):
    lines = metrics(40)
    lines[20:20] = [{"step": 20, "time": 1e9 + 1230, "eval/loss": 1.5, "eval/de/loss": 1.25, "eval/fr/loss": 1.75}]
    html = page_of(write_run(tmp_path / "a", lines))
    loss, sources = chart(html, "Loss"), chart(html, "Held-out loss by source")
    assert loss["training"]["step"] == [*range(1, 41)] and "low" not in loss["training"]
    assert loss["training"]["y"] == five_digits([line["train/loss"] for line in lines if "train/loss" in line])
    assert loss["training"]["tokens"] == [10 * step for step in range(1, 41)]
    assert loss["training"]["minutes"] == [*range(40)]
    assert loss["held out"]["y"] == [1.5] and loss["held out"]["step"] == [20] and loss["held out"]["tokens"] == [200]
    assert {name: one["y"] for name, one in sources.items()} == {"de": [1.25], "fr": [1.75]}
    assert [*chart(html, "Norm of the gradient")] == ["a"]


def twin(values: dict[int, float], width: int) -> list[tuple[float, ...]]:
    """What thin.py says of itself, value by value."""
    points, buckets = {}, dict[int, list[int]]()
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    for step in finite:
        buckets.setdefault(step // width, []).append(step)
    for step in (min(finite), max(finite)):
        points[step] = (step, *[finite[step]] * 3)
    for steps in buckets.values():
        held = [finite[step] for step in steps]
        middle = (min(steps) + max(steps)) / 2
        middle += 0.25 if middle in values and middle not in finite else 0
        points[middle] = (middle, statistics.median_low(held), min(held), max(held))
    for step in sorted(set(values) - set(finite), reverse=True):
        same = [
            other for other in values if other // width == step // width and str(values[other]) == str(values[step])
        ]
        if step == min(same):
            points[step] = (step, *[values[step]] * 3)
    return sorted(points.values())


@pytest.mark.parametrize("steps", [1, 2, 300, 301, 700, 4321])
def test_a_long_run_is_thinned_as_it_says(tmp_path, steps):
    rng = np.random.default_rng(0)
    values = {int(step): float(rng.normal()) for step in np.flatnonzero(rng.random(steps) < 0.8) + 1} | {steps: 0.5}
    if steps > 10:
        values |= {steps // 2: NAN, steps // 2 + 1: NAN, steps // 3: INF, steps // 4: -INF}
    values = dict(sorted(values.items()))
    place = write_run(tmp_path / "a", [{"step": step, "x": value} for step, value in values.items()])
    found = history.read(place / "metrics.jsonl")
    assert str([*map(tuple, found.curves["x"])]) == str(twin(values, -(-(steps + 1) // thin.POINTS)))
    assert len(found.curves["x"]) <= thin.POINTS + 10 and found.last["x"] == (steps, 0.5)


def test_steps_that_were_done_again_count_once(tmp_path):
    """Whoever has written both: ours are cut where a run resumes, and say in their attempts what was lost."""
    first = [{"step": step, "attempt": 1, "train/loss": 10.0 + step} for step in range(1, 8)]
    again = [{"step": step, "attempt": 2, "train/loss": 20.0 + step} for step in range(5, 10)]
    found = history.read(write_run(tmp_path / "a", [*first, *again]) / "metrics.jsonl")
    assert [(p.step, p.value) for p in found.curves["train/loss"]] == [
        *((step, 10.0 + step) for step in range(1, 5)), *((step, 20.0 + step) for step in range(5, 10)),
    ]  # fmt: skip


def test_what_is_not_finite_in_the_middle_of_its_bucket_is_seen(tmp_path):
    lines = [{"step": step, "x": NAN if step == 301 else 1.0} for step in range(1, 800)]
    found = history.read(write_run(tmp_path / "a", lines) / "metrics.jsonl").curves["x"]
    assert [(p.step, p.value == 1.0) for p in found if 300 <= p.step <= 302] == [(301, False), (301.25, True)]


def test_scores_may_come_in_any_order(tmp_path):
    """`eval` measures an old checkpoint behind the last step, and one a second time."""
    scores = [{"step": step, "eval/x/acc": value} for step, value in ((1000, 0.1), (1000, 0.5), (500, 0.25))]
    found = history.read(write_run(tmp_path / "a", [*metrics(1000), *scores]) / "metrics.jsonl")
    assert [(p.step, p.value) for p in found.curves["eval/x/acc"]] == [(500, 0.25), (1000, 0.5)]
    assert found.last["eval/x/acc"] == (1000, 0.5) and len(found.curves["train/loss"]) <= thin.POINTS + 2


def attempt(number: int, first: int, last: int, began: float, ended: float, code: int | None) -> dict[str, Any]:
    times = {"job_start_time": began, "job_end_time": ended, "seconds": {"step": ended - began}}
    return {"attempt": number, "first_step": first, "step_count": last, "exit_code": code, **times}


def test_restarts_lost_steps_and_roll_backs_are_marked(tmp_path):
    lines = metrics(30)
    lines[20] |= {"rollback/step": 25, "rollback/loss": NAN, "rollback/grad_norm": NAN, "rollback/next_row": 200}
    began = 1e9 + 60
    attempts = [
        attempt(1, 0, 14, began, began + 900, None), attempt(2, 10, 12, began + 960, began + 990, 75),
        attempt(3, 12, 30, began + 1000, began + 2000, 0),
    ]  # fmt: skip
    assert [*run.lost_steps(attempts)] == [(0, 10, 14)]
    place = write_run(tmp_path / "a", lines, attempts__goodput_jsonl="\n".join(map(json.dumps, attempts)))
    html = page_of(place)
    (data,) = (data for data in Reader(html).data() if data.get("title") == "Loss")
    assert [(mark["text"], mark["x"]["step"], mark.get("until", {}).get("step")) for mark in data["marks"]] == [
        ("attempt 2 begins (killed before)", 10, None),
        ("attempt 3 begins (exit 75 before)", 12, None),
        ("steps 11 to 14 were lost and done again", 10, 14),
        ("step 25 was not finite (loss nan): back to step 20", 21, None),
    ]
    lost = data["marks"][2]  # in time before the second attempt began
    assert (lost["x"]["minutes"], lost["until"]["minutes"]) == (9, 15)
    assert [mark["x"]["minutes"] for mark in data["marks"][:2]] == [16, pytest.approx(16 + 2 / 3)]  # as they did
    attempts[0]["job_end_time"] = began + 300  # before the second time of step 11
    (place / "attempts/goodput.jsonl").write_text("\n".join(map(json.dumps, attempts)))
    (data,) = (data for data in Reader(page_of(place)).data() if data.get("title") == "Loss")
    assert (data["marks"][2]["x"]["minutes"], data["marks"][2]["until"]["minutes"]) == (5, 5)
    assert [*run.lost_steps([attempt(1, 50, 50, 0, 1, 1), attempt(2, 40, 60, 2, 3, 0)])] == []
    assert "75: stopped on request, saved" in html and "no end was noted" in html


def test_strips_are_the_sums_of_their_steps(tmp_path):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (200, 3, 4))
    counts[:, 2] = 0
    lines = [{"step": step + 1, "counts": of.tolist()} for step, of in enumerate(counts)]
    lines[50:50] = [
        {"step": 50, "counts": "x"},
        {"step": 50, "counts": [[1, 2]]},
        {"step": 50, "counts": [[1], [2, 3]]},
    ]
    file = tmp_path / "moe.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 201, "cou')
    found = experts.read_loads(file)
    width = -(-201 // experts.COLUMNS)
    for column, last in enumerate(found.steps):
        steps = [step for step in range(1, 201) if step // width == last // width]
        assert last == steps[-1]
        held = counts[np.array(steps) - 1].sum(0)
        np.testing.assert_allclose(found.load_LES[:2, :, column], held[:2] * 4 / held[:2].sum(1, keepdims=True))
        assert np.isnan(found.load_LES[2, :, column]).all()


def test_a_line_may_be_the_mean_of_its_neighbours():
    points = [thin.Point(step, *[float(step % 2)] * 3) for step in range(20)]
    points[10] = thin.Point(10, NAN, NAN, NAN)
    found = thin.smoothed(points, 3)
    assert found[5] == (5, pytest.approx(1 / 3), 1.0, 1.0) and math.isnan(found[10].value)
    assert found[0] == (0, 0.5, 0.0, 0.0) and found[9] == (9, 0.5, 1.0, 1.0)
    assert [point.value for point in thin.smoothed(points[:8], 2)] == [0.5] * 7 + [1.0]
    assert thin.smoothed(points[:9], 3) == points[:9] and thin.smoothed(points, 1) == points


def test_text_of_models_and_people_is_text(tmp_path):
    lines = [*metrics(3, **{NASTY: 1.5}), {"step": 3, f"eval/{NASTY}/loss": 2.0, f"eval/task/{NASTY}": 1.0}]
    sample = json.dumps({"step": 2, "prompt": NASTY, "text": NASTY * 2})
    files = {
        "STATUS": json.dumps({"state": NASTY, "reason": NASTY, "step": 3}),
        "logs__process_0.log": NASTY.replace("\ud800", ""),
    }
    files |= {
        "samples__2_jsonl": sample,
        "env_json": json.dumps({"command": [NASTY], "changed_settings": {"a": NASTY}}),
    }
    html = page_of(write_run(tmp_path / "a'\"<b>", lines, **files))
    read = Reader(html)
    assert {"a'\"<b>", SHOWN, SHOWN * 2} <= {text for _, text in read.texts}


ATTEMPT = '{"first_step": 0, "step_count": 1, "job_start_time": 1e300, "job_end_time": NaN, "seconds": {}}\n{"a": 1}'


@pytest.mark.parametrize(
    "files",
    [
        {"STATUS": "{}"}, {"STATUS": '{"state": "training", "step": 3}', "metrics_jsonl": ""},
        {"metrics_jsonl": '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo'},
        {"metrics_jsonl": '{"step": 1, "train/tokens": "x", "b": true, "eval/": 1, "eval//": 2}\n[1]\nnull\n\xff'},
        {"metrics_jsonl": '{"step": 1, "rollback/step": null, "train/tokens": 1e999, "c": ' + "1" * 400 + "}"},
        {"metrics_jsonl": '{"step": 99999999999999999999, "x": 1}\n{"step": -1, "train/tokens": 1, "time": NaN}'},
        {"STATUS": "{}", "moe_jsonl": '{"step": 1, "counts": [[0, 0]]}', "samples__x_jsonl": "{", "env_json": "[1]"},
        {"STATUS": "{}", "config_yaml": "a: [", "eval__5__passkey_json": '{"accuracy": [[1], 2]}'},
        {"STATUS": "{}", "attempts__goodput_jsonl": ATTEMPT, "eval__x__by_length_json": '{"position": 3}'},
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_left_out(tmp_path, files):
    place = write_run(tmp_path / "a", [])
    (place / "metrics.jsonl").unlink()
    for name, text in files.items():
        file = place / name.replace("__", "/").replace("_json", ".json").replace("_yaml", ".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="latin-1")
    assert "How it stands" in page_of(place)
    other = write_run(tmp_path / "b", metrics(3))
    assert "2 runs" in page_of(place, other)


def test_separate_evaluations_are_shown(tmp_path):
    lines = [*metrics(5), {"step": 5, "eval/mmlu/acc": 0.5, "eval/mmlu/acc_stderr": 0.125, "eval/de/loss": 1.0}]
    lines[-1] |= {"eval/sums/exact_match,strict": 0.375, "eval/sums/exact_match,strict_stderr": 0.0625}
    passkey = {"lengths": [128, 256], "depths": [0.0, 1.0], "samples": 20, "accuracy": [[1, 0.5], [0.25, 0]]}
    by_length = {"position": [{"from": 0, "to": 128, "tokens": 999, "nll": 3.25, "bits_per_byte": None}]}
    files = {"eval__5__passkey_json": json.dumps(passkey), "eval__5__by_length_json": json.dumps(by_length)}
    html = page_of(write_run(tmp_path / "a", lines, **files))
    assert chart(html, "Tasks: exact match").keys() == {"sums,strict"}
    read = Reader(html)
    texts = [text for _, text in read.texts]
    assert texts[(at := texts.index("mmlu")) : at + 5] == ["mmlu", "acc", "0.5", "0.125", "5"]
    assert texts[(at := texts.index("sums")) : at + 5] == ["sums", "exact_match,strict", "0.375", "0.0625", "5"]
    assert texts.count("sums") == 1
    assert [texts[texts.index("3.25") - i] for i in (3, 2, 1)] == ["0", "128", "999"]
    (heat,) = (data for data in read.data() if data.get("rows") == ["0 %", "100 %"])
    assert heat["values"][""].split() == ["100", "50", "25", "0"] and heat["columns"] == ["128", "256"]


def test_a_source_that_is_measured_no_more_is_not_among_those_of_today(tmp_path):
    lines = [*metrics(3), {"step": 1, "eval/old/loss": 3.25, "eval/loss": 3.25}, {"step": 3, "eval/new/loss": 1.5}]
    lines[-1] |= {"eval/loss": 1.5}
    texts = [text for _, text in Reader(page_of(write_run(tmp_path / "a", lines))).texts]
    assert "Sources, after step 3" in texts and "new" in texts and "old" not in texts


def test_runs_lie_over_each_other_and_the_best_comes_first(tmp_path):
    places = []
    for rate, loss in ((0.1, 3.0), (0.01, 1.0), (1.0, NAN)):
        lines = [*metrics(5), {"step": 5, "eval/loss": loss}]
        places.append(write_run(tmp_path / str(rate) / "run", lines))
        (places[-1] / "config.yaml").write_text(f"optimizer: {{learning_rate: {rate}, b1: 0.9}}\nrun_name: x{rate}")
    html = page_of(*places)
    assert [*chart(html, "Loss: training")] == [*map(str, places)]
    assert chart(html, "Loss: held out")[str(places[0])]["y"] == [3]
    texts = [text for tag, text in Reader(html).texts if tag in ("th", "td")]
    assert texts[:3] == ["run", "optimizer.learning_rate", "held-out loss"] and "optimizer.b1" not in texts
    assert [text for text in texts if text in map(str, places)][:3] == [str(places[i]) for i in (1, 0, 2)]


@pytest.mark.parametrize("keys", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_hundred_thousand_steps(tmp_path, browser, keys):
    """One value of them is another; the page is small, made in seconds and bounded memory, and shows it."""
    steps, spike = 100_000, 77_777
    more = "".join(f', "moe/x{i}": 0.{i}25' for i in range(keys))
    place = write_run(tmp_path / "long", [])
    with (place / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 99.5 if step == spike else 2 + math.sin(step) / 9
            file.write(
                f'{{"step": {step}, "time": {1e9 + step}, "train/tokens": {step}, "train/loss": {loss:.6f}{more}}}\n'
            )
    with (place / "moe.jsonl").open("w") as file:
        for step in range(1, steps + 1, 100 if keys < 9 else 1):
            file.write(f'{{"step": {step}, "counts": {[[step, *range(7)]] * 32}}}\n')
    began = time.process_time()
    html = page_of(place)
    assert time.process_time() - began < 60 and len(html) < 1_000_000
    training = chart(html, "Loss")["training"]
    assert [step for step, high in zip(training["step"], training["high"], strict=True) if high == 99.5] == [
        pytest.approx(spike, abs=steps / thin.POINTS)
    ]
    assert max(training["y"]) < 2.2 and training["step"][0] == 1 and training["step"][-1] == steps
    browser.open(tmp_path / "page.html")
    heights = "[...document.querySelectorAll('figure.lines svg')][0].querySelector('.band').getBBox()"
    assert browser.js(f"{heights}.height") > 150 and browser.js(f"{heights}.y") < 20  # it reaches to the top
    assert browser.errors == []


@pytest.fixture
def opened(browser, tmp_path):
    lines = metrics(50)
    lines[30]["train/grad_norm"] = NAN
    sample = json.dumps({"step": 50, "prompt": NASTY, "text": NASTY})
    place = write_run(tmp_path / "a", lines, samples__50_jsonl=sample)
    (place / "moe.jsonl").write_text('{"step": 1, "counts": [[1, 3], [2, 2]]}\n')
    command.report([str(place)], out=None, watch=False, port=0, smooth=1)
    browser.open(place / "report.html")
    return browser, lines


def test_a_reader_goes_through_it(opened, tmp_path):
    browser, lines = opened
    titles = browser.js("[...document.querySelectorAll('figure.lines')].map(f => f.innerText.split('\\n')[0])")
    assert titles[:1] == ["Loss"] and "Norm of the gradient" in titles
    assert browser.js("document.querySelectorAll('figure.heat').length") == 2
    browser.hover("figure.lines > svg", across=0.999)
    assert tip(browser).split() == ["step", "50", "training", f"{lines[-1]['train/loss']:.4g}"]
    browser.js("[...document.querySelectorAll('.switches label')].find(l => l.innerText === 'tokens').click()")
    browser.hover("figure.lines > svg", across=0.999)
    assert tip(browser).split()[:2] == ["tokens", "500"]
    assert browser.js("document.querySelectorAll('.odd').length") == 1
    assert browser.js("typeof window.boomed") == "undefined"
    grounds = []
    for dark in (False, True):
        browser.dark(dark)
        grounds.append(browser.js("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] == "rgb(255, 255, 255)" and grounds[1] != grounds[0]
    assert browser.errors == [] and all(url.startswith(("file:", "data:")) for url in browser.requests)


def test_the_command(tmp_path, capsys, monkeypatch):
    a, b = (write_run(tmp_path / name, metrics(3)) for name in "ab")

    def call(*words: object) -> tuple[int, str]:
        code = launch.main(["report", *map(str, words)])
        heard = capsys.readouterr()
        return code, heard.out + heard.err

    assert call(a) == (0, f"{a / 'report.html'}\n") and (a / "report.html").stat().st_size > 1000
    assert call(a, b, "--out", tmp_path / "x.html", "--smooth", 2)[0] == 0
    assert "2 runs" in (tmp_path / "x.html").read_text() and sorted(p.name for p in b.iterdir()) == ["metrics.jsonl"]
    refused = {
        "no directory of a run": [tmp_path / "c"], f"in it are {a}, {b}": [tmp_path],
        "in no directory that there is": [a, "--out", tmp_path / "c" / "x.html"], "is a directory": [a, "--out", b],
        "--smooth is 0": [a, "--smooth", 0], "--port 70000": [a, "--watch", "--port", 70000],
        "--port is for --watch": [a, "--port", 80], "leave out --out": [a, "--watch", "--out", "x.html"],
    }  # fmt: skip
    for sentence, words in refused.items():
        code, said = call(*words)
        assert (code, said.count("\n")) == (2, 1) and sentence in said, said

    def denied(file: Path, text: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(command, "write_atomically", denied)  # root may write anywhere
    code, said = call(a)
    assert code == 2 and f"{a / 'report.html'} cannot be written (Permission denied): --out says" in said


def test_a_page_that_is_watched_is_made_anew_where_there_is_news(tmp_path, monkeypatch):
    place, scripts = write_run(tmp_path / "a", metrics(3), STATUS='{"state": "training", "time": 1}'), list[str]()
    now = [100.0]
    monkeypatch.setattr(serve.time, "monotonic", lambda: now[0])

    def render(script: str) -> str:
        scripts.append(script)
        now[0] += 2  # seconds
        return script

    latest = serve._Latest([place], render)
    assert latest.state() in latest.page()
    (place / "STATUS").write_text('{"state": "training", "time": 2}')  # it lives
    assert latest.page() == scripts[0] and len(scripts) == 1
    (place / "STATUS").write_text('{"state": "done", "time": 3, "exit_code": 0}')
    assert latest.state() in scripts[0]  # it was made too recently
    now[0] += 20
    assert latest.state() not in scripts[0]
    assert latest.page() == scripts[1]


def test_a_few_samples_are_read_and_all_count(tmp_path):
    files = {f"samples__{step}_jsonl": json.dumps({"step": step, "prompt": "a", "text": "b"}) for step in range(9)}
    place = write_run(tmp_path / "a", metrics(3), **files)
    assert [*run.read_run(place, "a").samples] == [0, 3, 5, 8]
    (place / "samples" / "5.jsonl").write_text("x" * 12_345)
    assert command._size(place, command._READ) > 12_345


def test_it_is_served_on_this_machine_alone_and_reloads(tmp_path, browser):
    place, said = write_run(tmp_path / "a", metrics(3)), list[str]()
    made = threading.Thread(
        target=serve.serve,
        args=([place], 0, lambda script: command._page([place], 1, script), said.append),
        daemon=True,
    )
    made.start()
    while not said:
        time.sleep(0.01)
    address = said[0].split()[0]
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "localhost"})) as answer:
        assert answer.status == 200  # without a port too
    for path, host, code in (("x", None, 404), ("", "evil.example", 403)):
        headers = {} if host is None else {"Host": host}
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(address + path, headers=headers))
        error.value.close()
        assert error.value.code == code
    browser.open(address)
    assert "3" in browser.js("document.querySelector('.tiles').innerText")
    with (place / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4321, "train/loss": 1.0}) + "\n")
    browser.wait("document.querySelector('.tiles')?.innerText.includes('4,321')")
    assert browser.errors == []


def test_a_reader_who_goes_away_is_no_error(tmp_path, capfd):
    place, said, asked = write_run(tmp_path / "a", metrics(3)), list[str](), threading.Event()

    def render(script):
        asked.set()
        time.sleep(0.3)
        return "x" * 10_000_000  # more than the system holds for a reader

    threading.Thread(target=serve.serve, args=([place], 0, render, said.append), daemon=True).start()
    while not said:
        time.sleep(0.01)
    port = int(said[0].split()[0].rstrip("/").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as reader:
        reader.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        asked.wait(10)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, as a closed tab does
    time.sleep(1)
    assert capfd.readouterr().err == ""


def test_watching_ends_with_ctrl_c(tmp_path):
    place = write_run(tmp_path / "a", metrics(3))
    words = [sys.executable, launch.__file__, "report", str(place), "--watch"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "Ctrl-C ends this" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stderr.read() if process.stderr else "") == (0, "")
    assert not (place / "report.html").exists()


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("diverged", 3), ("preempted", 75), ("failed", 1)])
def test_an_attempt_leaves_the_page_of_its_run_however_it_ends(tmp_path, monkeypatch, state, code):
    """As RunDirectory writes STATUS; a page that cannot be made is a line, and no more."""
    place = RunDirectory(write_run(tmp_path / "a", metrics(7)))
    place.create()
    place.begin()
    place.write_status("training", 7, "", None)
    assert not (place.path / "report.html").exists()
    place.step = 7
    if state == "failed":
        place.write_failure("it was so", code)
    else:
        assert place.write_status(state, 7, "it was so", code)[-1] == f"the run's page: {place.path / 'report.html'}"
        place.write_failure("a second Ctrl-C", 130)  # the first end counts
    assert not (place.path / "report.html").exists()
    place.leave_page()
    texts = {text for _, text in Reader((place.path / "report.html").read_text()).texts}
    assert {state, "it was so."} <= texts
    monkeypatch.setattr(command, "render", lambda *args, **more: 1 / 0)
    place.leave_page()
    assert "could not be made: ZeroDivisionError" in place.log.read_text()
    monkeypatch.setattr(command, "_AT_ONCE", 10)
    assert f"mixtral-jax report {place.path} makes it" in place.write_status(state, 7, "", code)[-1]
    assert json.loads((place.path / "STATUS").read_text())["exit_code"] == code


def test_it_starts_without_jax(tmp_path):
    place = write_run(tmp_path / "a", metrics(3))
    code = (
        f"import sys; from mixtral_jax import launch; assert launch.main(['report', {str(place)!r}]) == 0\n"
        "assert not {'jax', 'pyarrow', 'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
