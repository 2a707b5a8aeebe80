"""Data sets of the hub, read whole or refused in a sentence."""

from typing import Any

from asnn_goose.errors import UserError


def load_from_hub(name: str, group: str) -> Any:
    """Splits by name of the data set ``name``, written ``id:configuration`` where it has several.

    Args:
        group: ``data`` or ``task``, whose keys ``name`` and ``source`` say what to read.

    Raises:
        UserError: no configuration named where there are several; neither cached nor reachable; files that the library
            does not read.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    identity, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(identity, configuration or None)
    # What the library does not find in its cache is a ValueError, a data set with code of its own a RuntimeError.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if any(words in reason for words in ("Config name is missing", "BuilderConfig", "There are multiple")):
            raise UserError(
                f"{group}.name {name!r} must say which configuration: write {identity}:NAME{_known(identity)}"
            ) from error
        if isinstance(error, OSError) or "Couldn't find cache" in reason:
            raise UserError(
                f"the data set {name!r} is neither in the hub's cache nor reachable: connect to the hub, check "
                f"{group}.name, or use {group}.source asset or files"
            ) from error
        raise UserError(
            f"the data set {name!r} cannot be read ({reason}): choose another, or save its texts and use "
            f"{group}.source files"
        ) from error


def _known(identity: str) -> str:
    import datasets

    try:
        return f" with NAME one of {', '.join(datasets.get_dataset_config_names(identity))}"
    except Exception:  # without a network, each version of the library raises another type
        return ""
