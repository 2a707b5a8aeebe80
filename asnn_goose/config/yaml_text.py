"""YAML as a configuration needs it: no key twice, and no word that turns into a truth value."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Safe; refuses a mapping with a key twice; true and false alone are truth values, as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} stands twice: keep one", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOL or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """What the text says.

    Raises:
        yaml.YAMLError: not YAML, or a key twice in one mapping.
        ValueError: a date that there is not.
    """
    return yaml.load(text, Loader=_Loader)
