"""A teacher and a text small enough for a whole run in seconds; both real, and made anew by each test session."""

import contextlib
import logging
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest

# Read when Triton is first imported, which other libraries may do on their own; there is no GPU to run kernels on.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from asnn_goose import cli
from asnn_goose.config import Experiment, load_experiment
from asnn_goose.models import GooseConfig, GooseForCausalLM, Teacher

# How long an example takes is the machine's affair, and of what else runs there; the same examples come everywhere.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")

SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "za")
DOCUMENTS = 60


def until(happened: Callable[[], bool]) -> None:
    """Wait for something that takes seconds on an idle machine; give up after twenty minutes."""
    for _ in range(12_000):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def bytes_tokenizer(symbols: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One token per byte and an end-of-text token: 257 in all. ``symbols`` reorders the bytes."""
    symbols = symbols or sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate([*symbols, "<eos>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def write_texts(folder: Path, documents: int = DOCUMENTS, seed: int = 0) -> Path:
    """A folder of .txt files of made-up words, no two alike."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    for number in range(documents):
        words = ("".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(draw.randint(20, 40)))
        (folder / f"{number:03d}.txt").write_text(" ".join(words) + ".\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama of width 32 over bytes, with rows that pad its vocabulary."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    # A wide initialisation, so that its distributions are far from uniform and the student has something to learn.
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        tie_word_embeddings=True,
        max_position_embeddings=200_000,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of :func:`write_texts`."""
    return write_texts(tmp_path_factory.mktemp("text") / "texts")


@contextlib.contextmanager
def logger_put_back() -> Iterator[None]:
    """The command line takes the project's logger for its process; here other tests follow."""
    logger = logging.getLogger("asnn_goose")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def _logger_put_back() -> Iterator[None]:
    with logger_put_back():
        yield


@pytest.fixture
def disk_with_room_for() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Within it no file may grow beyond some bytes: the system fails as on a full disk, after a short write."""

    @contextlib.contextmanager
    def room(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return room


def flags_for(teacher: Path, text: Path, **changes: object) -> list[str]:
    """Flags of a run of four steps; the keyword ``train__lr`` sets ``--train.lr``, and None leaves a flag out."""
    base: dict[str, object] = {
        "scale": "smoke",
        "teacher.name": teacher,
        "teacher.dtype": "float32",
        "data.source": "files",
        "data.path": text,
        "data.window": 16,
        "data.validation_fraction": 0.15,
        "data.test_fraction": 0.15,
        "student": "goose",
        "student.layers": 2,
        "student.head_size": 16,
        "train.precision": "float32",
        "train.device": "cpu",
        "train.steps": 4,
        "train.batch_size": 2,
        "train.log_every": 1,
        "train.eval_every": 2,
        "train.checkpoint_every": 2,
        "train.validation_tokens": 256,
        "train.test_tokens": 256,
        "train.wandb": "off",
    }
    values = base | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items() if value is not None]


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache for what tiny runs tokenise and compute, apart from the one with the fetched assets."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_flags(
    tiny_teacher: Path, tiny_text: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """:func:`flags_for` the tiny teacher and text; runs and reports go below ``tmp_path``."""
    monkeypatch.setenv("ASNN_GOOSE_CACHE", str(tiny_cache))
    monkeypatch.setenv("ASNN_GOOSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ASNN_GOOSE_REPORTS", str(tmp_path / "reports"))
    return partial(flags_for, tiny_teacher, tiny_text)


@pytest.fixture
def tiny_experiment(tiny_flags: Callable[..., list[str]]) -> Callable[..., Experiment]:
    """v11_1, or another version, with :func:`tiny_flags`."""

    def experiment(version: str = "v11_1", **changes: object) -> Experiment:
        return load_experiment(version, tiny_flags(**changes)).experiment

    return experiment


@pytest.fixture(scope="session")
def tiny_run(tiny_teacher: Path, tiny_text: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one finished run of v11_1 through the command line; its report is in ``reports`` three levels up."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, logger_put_back():
        patch.setenv("ASNN_GOOSE_CACHE", str(tiny_cache))
        patch.setenv("ASNN_GOOSE_RUNS", str(root / "runs"))
        patch.setenv("ASNN_GOOSE_REPORTS", str(root / "reports"))
        assert cli.main("v11_1", flags_for(tiny_teacher, tiny_text)) == 0
    (folder,) = (root / "runs" / "v11_1").iterdir()
    return folder


@pytest.fixture
def make_student() -> Callable[..., GooseForCausalLM]:
    """A student of two layers of width 32 of which no part is at 0, in eval mode: keywords are GooseConfig's."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **keys: object) -> GooseForCausalLM:
        torch.manual_seed(seed)
        shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "head_size": 16}
        student = GooseForCausalLM(GooseConfig(**{**shape, **keys}))  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        torch.nn.Module.to(student, dtype)
        return student.eval()

    return make


@pytest.fixture
def make_teacher() -> Callable[..., Teacher]:
    """A random Llama of two layers over bytes, with rows that pad its vocabulary: keywords are LlamaConfig's."""

    def make(model: PreTrainedModel | None = None, **keys: object) -> Teacher:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        rest = {"vocab_size": 264, "initializer_range": 0.2, "tie_word_embeddings": True}
        model = model or LlamaForCausalLM(LlamaConfig(**{**shape, **rest, **keys}))  # pyright: ignore[reportArgumentType]
        return Teacher("tiny", model, bytes_tokenizer(), "fingerprint")

    return make
