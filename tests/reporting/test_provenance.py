import os
import shlex
import subprocess
from datetime import timedelta

import pytest

from asnn_goose.config.load import load_experiment
from asnn_goose.reporting.provenance import code_version, collect_provenance, reproducing_command


@pytest.fixture(autouse=True)
def no_other_git(monkeypatch):
    """A hook tells its children where its own repository is, and a user's settings may sign or refuse a commit."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / ".gitignore").write_text("runs/\n")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path


def head(repository):
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_clean_checkout(repository):
    assert code_version(repository) == (head(repository), False)


@pytest.mark.parametrize(
    ("path", "dirty"), [("code.py", True), ("new.py", True), ("reports/v1/report.md", False), ("runs/x", False)]
)
def test_only_code_makes_a_checkout_dirty(repository, path, dirty):
    (repository / path).parent.mkdir(parents=True, exist_ok=True)
    (repository / path).write_text("x = 2\n")
    assert code_version(repository) == (head(repository), dirty)


def test_outside_a_repository_there_is_no_commit(tmp_path):
    assert code_version(tmp_path) == (None, None)


def test_an_installation_below_another_repository_has_no_commit(repository):
    (repository / "site").mkdir()
    assert code_version(repository / "site") == (None, None)


def test_the_command_gives_the_same_experiment_again():
    flags = ["--scale=smoke", "--seed=3", "--student.neuron.detach_reset=false", "--train.steps=7"]
    flags += ["--data.source=files", "--data.path=some folder/it's", "--student.neuron.width=null"]
    asked = load_experiment("v11_1", flags)
    words = shlex.split(reproducing_command(asked.experiment, asked.overrides))
    assert words[:2] == ["python", "experiments/v11_1.py"]
    assert load_experiment("v11_1", words[2:]).experiment == asked.experiment
    assert len(words) == len({word.split("=")[0] for word in words})


def test_run_id_sorts_by_time_and_names_seed_and_fingerprint(make_experiment, tmp_path):
    experiment = make_experiment({"seed": 4})
    provenance = collect_provenance(experiment, "89abcdef" + 56 * "0", argv=["x.py", "--seed", "4"], overrides={})
    assert provenance.run_id == f"{provenance.started:%Y%m%d-%H%M%S}-s4-89abcdef"
    assert provenance.started.utcoffset() == timedelta(0)
    assert provenance.argv == ("x.py", "--seed", "4")
    assert provenance.libraries["numpy"] == __import__("numpy").__version__
    assert provenance.hardware.cores >= 1 and provenance.hardware.memory_bytes > 2**20 and provenance.hardware.cpu
