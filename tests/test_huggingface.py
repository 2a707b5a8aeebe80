"""The transformers library kept quiet, and a broken torchvision explained."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import asnn_goose
from asnn_goose.huggingface import quiet_transformers, save_tokenizer

PROGRAM = """
import sys
from asnn_goose.errors import UserError
from asnn_goose.huggingface import import_transformers
assert "torch" not in sys.modules and "transformers" not in sys.modules
try:
    import_transformers()
except UserError as error:
    print(error)
"""


def test_a_torchvision_of_another_torch_is_one_sentence(tmp_path):
    (tmp_path / "torchvision").mkdir()
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    )
    root = str(Path(asnn_goose.__file__).parents[1])
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
    )
    assert told.returncode == 0, told.stderr
    assert "pip uninstall torchvision torchaudio" in told.stdout
    assert told.stdout.count("\n") == 1


def test_quiet_silences_and_restores(capsys):
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_info()
    logger = transformers_logging.get_logger("transformers.anything")
    try:
        with quiet_transformers():
            logger.warning("a warning")
            print("a bar", file=sys.stderr)
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
        assert capsys.readouterr().err == ""
    finally:
        transformers_logging.set_verbosity_warning()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_the_systems_error(tiny_teacher, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as told:
        save_tokenizer(tokenizer, tmp_path)
    assert told.value.errno == errno.ENOSPC
    save_tokenizer(tokenizer, tmp_path / "elsewhere")
